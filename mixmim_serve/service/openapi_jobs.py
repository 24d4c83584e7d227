"""Jobs in the OpenAPI document."""

from __future__ import annotations

from mixmim_serve.extract.options import DTYPES, ExtractOptions, Resources
from mixmim_serve.service.jobs.runner import FORMATS, MAX_BATCH, MAX_IMAGES
from mixmim_serve.service.jobs.store import STATES
from mixmim_serve.service.openapi_parts import CLOSED, INTEGER, STRING, Json, object_of, option, ref, refusals_of


def job_paths() -> Json:
    """Routes of jobs."""
    id_ = option("id", STRING, "Of the job.") | {"required": True}
    state = f"({'|'.join(STATES)})"
    listing = [
        option("id", STRING, "One job, with its files; without it all jobs, the newest first."),
        option("state", {"type": "string", "pattern": f"^{state}(,{state})*$"}, "Of a list: only jobs in these."),
        option("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "Of a list."),
    ]
    again = option("retry_failed", {"type": "boolean", "default": False}, "Then try again what could not be read.")
    name = option("name", STRING, "As the job gives it.") | {"required": True}
    job = {"description": "The job.", "content": {"application/json": {"schema": ref("Job")}}}
    jobs = {"description": "The job, or jobs.", "content": {"application/json": {"schema": {"anyOf": [
        ref("Job"), ref("JobList")]}}}}  # fmt: skip
    data = {"description": "The file.", "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object"}}}}  # fmt: skip
    asked = {"source": "photos/2026", "options": {"features": ["stage4"], "dtype": "float16"}}
    body = {"required": True, "content": {"application/json": {"schema": ref("JobRequest"), "example": asked}}}
    return {
        "/jobs": {
            "post": {"summary": "Extract features of many images on the server", "requestBody": body,
                     "responses": {"200": job | {"description": "The job that does the same already."},
                                   "201": job | {"description": "The new job."}}
                     | refusals_of(400, 401, 404, 408, 413, 415, 429, 503, 504)},
            "get": _job("A job and its results, or all jobs", listing, {"200": jobs}, 400),
            "delete": _job("Delete a job that has ended, with its results", [id_], {"204": {"description": "Done."}},
                           400, 409),
        },
        "/jobs/cancel": {"post": _job("Stop a job; what is whole stays", [id_], {"200": job}, 400, 429, 503)},
        "/jobs/resume": {
            "post": _job("Go on with a job that has ended", [id_, again], {"200": job}, 400, 409, 429, 503)
        },
        "/jobs/file": {"get": _job("A file of a job's results", [id_, name], {"200": data}, 400)},
    }  # fmt: skip


def _job(summary: str, parameters: list[Json], answers: Json, *refusals: int) -> Json:
    """An operation on jobs: all may need a key, or find no such job, or no jobs at all."""
    return {"summary": summary, "parameters": parameters, "responses": answers | refusals_of(401, 404, *refusals)}


def job_schemas() -> Json:
    """What jobs are asked for and answered with."""
    maybe_number, maybe_text = {"type": ["number", "null"]}, {"type": ["string", "null"]}
    number = {"type": "number"}
    options = {
        "features": {"type": "array", "items": STRING, "default": []},
        "format": {"enum": list(FORMATS), "default": ExtractOptions.format},
        "dtype": {"enum": list(DTYPES), "default": ExtractOptions.dtype},
        "batch": {"type": "integer", "minimum": 1, "maximum": MAX_BATCH, "default": ExtractOptions.batch},
        "images": {"type": "integer", "minimum": 0, "maximum": MAX_IMAGES, "default": 0, "description": "Of a shard."},
        "fast_jpeg": {"type": "boolean", "default": False},
        "max_failures": {"type": "number", "minimum": 0, "maximum": 1, "default": Resources.max_failures},
    }
    progress = {"images": INTEGER, "done": INTEGER, "errors": INTEGER, "images_per_second": number, "waiting": number,
                "seconds_left": maybe_number}  # fmt: skip
    shown = {
        "id": STRING, "state": {"enum": list(STATES)}, "source": STRING, "options": {"type": "object"},
        "created": STRING, "started": maybe_text, "ended": maybe_text,
        "progress": {"oneOf": [object_of(progress), {"type": "null"}]}, "error": maybe_text, "url": STRING,
    }  # fmt: skip
    file = object_of({"name": STRING, "bytes": INTEGER, "url": STRING})
    more = {"ahead": INTEGER, "rows": INTEGER, "files": {"type": "array", "items": file}}
    listed = {"type": "array", "items": ref("Job")}
    return {
        "JobRequest": object_of({"source": STRING, "options": object_of(options, required=()) | CLOSED},
                              required=("source",)) | CLOSED,
        "Job": object_of(shown | more, required=shown),
        "JobList": object_of({"data": listed, "counts": {"type": "object", "additionalProperties": INTEGER}}),
    }  # fmt: skip
