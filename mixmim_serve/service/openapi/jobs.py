"""Job routes in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence

from mixmim_serve.service.jobs.options import schema as options_schema
from mixmim_serve.service.jobs.store import STATES
from mixmim_serve.service.openapi.parts import BINARY, CLOSED, INTEGER, STRING, error_refs, object_schema, ref
from mixmim_serve.service.options import Json

JOB: Json = {"description": "The job.", "content": {"application/json": {"schema": ref("Job")}}}


def create(parameters: Sequence[Json]) -> Json:
    """POST /jobs."""
    example = {"source": "photos/2026", "options": {"features": ["stage4"], "dtype": "float16"}}
    body = {"required": True, "content": {"application/json": {"schema": ref("JobRequest"), "example": example}}}
    answers = {
        "200": JOB | {"description": "The unfinished job with the same source and options."},
        "201": JOB | {"description": "The new job."},
    }
    return {
        "summary": "Queue a job that extracts features of many images",
        "requestBody": body,
        "responses": answers | error_refs(400, 401, 404, 408, 413, 415, 429, 503, 504, 507),
    }


def show(parameters: Sequence[Json]) -> Json:
    """GET /jobs."""
    content = {"application/json": {"schema": {"anyOf": [ref("Job"), ref("JobList")]}}}
    answers = {"200": {"description": "The job, or a list of jobs.", "content": content}}
    return _operation("Get a job and its results, or list all jobs", parameters, answers, 400, 429, 503)


def remove(parameters: Sequence[Json]) -> Json:
    """DELETE /jobs."""
    answers = {"204": {"description": "Deleted."}}
    return _operation("Delete a finished job and its results", parameters, answers, 400, 409, 429, 503, 507)


def cancel(parameters: Sequence[Json]) -> Json:
    """POST /jobs/cancel."""
    return _operation("Stop a job and keep its complete shards", parameters, {"200": JOB}, 400, 429, 503, 507)


def resume(parameters: Sequence[Json]) -> Json:
    """POST /jobs/resume."""
    return _operation("Resume a job that has ended", parameters, {"200": JOB}, 400, 409, 429, 503, 507)


def file(parameters: Sequence[Json]) -> Json:
    """GET /jobs/file."""
    content: Json = {
        "application/octet-stream": {"schema": BINARY},
        "application/json": {"schema": {"type": "object"}},
    }
    answers = {"200": {"description": "The file.", "content": content}}
    return _operation("Download a file of a job's results", parameters, answers, 400, 429, 503)


def _operation(summary: str, parameters: Sequence[Json], answers: Json, *errors: int) -> Json:
    """An operation on jobs: each may need a key, or find no such job, or no jobs at all."""
    return {"summary": summary, "parameters": list(parameters), "responses": answers | error_refs(401, 404, *errors)}


def schemas() -> Json:
    """The bodies and answers of the job routes."""
    maybe_number, maybe_text = {"type": ["number", "null"]}, {"type": ["string", "null"]}
    number = {"type": "number"}
    counts = {"type": "object", "additionalProperties": INTEGER}
    progress = {"images": INTEGER, "done": INTEGER, "errors": INTEGER, "images_per_second": number, "waiting": number,
                "seconds_left": maybe_number, "passed_over": counts}  # fmt: skip
    job = {
        "id": STRING, "state": {"enum": list(STATES)}, "source": STRING, "options": {"type": "object"},
        "created": STRING, "started": maybe_text, "ended": maybe_text,
        "progress": {"oneOf": [object_schema(progress), {"type": "null"}]}, "error": maybe_text, "url": STRING,
    }  # fmt: skip
    file = object_schema({"name": STRING, "bytes": INTEGER, "url": STRING})
    optional = {"ahead": INTEGER, "rows": INTEGER, "files": {"type": "array", "items": file}}
    data = {"type": "array", "items": ref("Job")}
    request = {"source": STRING, "options": object_schema(options_schema(), required=()) | CLOSED}
    return {
        "JobRequest": object_schema(request, required=("source",)) | CLOSED,
        "Job": object_schema(job | optional, required=job),
        "JobList": object_schema({"data": data, "counts": counts}),
    }
