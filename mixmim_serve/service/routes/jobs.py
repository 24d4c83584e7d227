"""POST /jobs, and what is done with a job afterwards. All holders of a key see all jobs.

A job is `mixmim extract` with this server's model: its source lies below a root that the operator named, its results in
a folder of the server's own, from which they are fetched by link.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from mixmim_serve.errors import DataError
from mixmim_serve.extract.folder import MANIFEST
from mixmim_serve.service import query
from mixmim_serve.service.encoding import json_response
from mixmim_serve.service.intake import media_type, parse_json
from mixmim_serve.service.jobs.runner import Jobs
from mixmim_serve.service.jobs.store import ENDED, STATES, Record
from mixmim_serve.service.problems import RequestError

HOW = 'send JSON such as {"source": "photos", "options": {"features": ["stage4"]}}.'
KEYS = ("source", "options")
LISTED = 100  # jobs of a list, when nobody says


async def create(request: Request) -> Response:
    """A new job, 201; the same request again is answered with the job that it made, 200, until that has ended."""
    jobs = _jobs_of(request)
    query.only(request)
    if media_type(request) != "application/json":
        raise RequestError(415, "unsupported_body", f"content type {media_type(request)!r} is not accepted: {HOW}")
    asked = parse_json(await request.body(), HOW)
    for name in asked:
        if name not in KEYS:
            raise RequestError(400, "unknown_key", f"no key {name!r} here, only {' and '.join(KEYS)}.", name)
    found = await _found(jobs.submit, asked.get("source"), asked.get("options", {}))
    if found is None:
        message = f"{jobs.settings.jobs_waiting} jobs are waiting already: try again when some have ended."
        raise RequestError(429, "too_many_jobs", message, headers={"Retry-After": "60"})
    record, is_new = found
    return json_response(
        await asyncio.to_thread(_view, jobs, record), 201 if is_new else 200, {"Location": _url(record)}
    )


async def show(request: Request) -> Response:
    """The job with this `id`, with links to its results; without one all jobs, the newest first."""
    jobs = _jobs_of(request)
    query.only(request, "id", "state", "limit")
    if "id" in request.query_params:
        return await _answer(jobs, await _record(request, jobs.store.get))
    states = query.several(request, "state", ",".join(STATES), STATES)
    limit = query.number(request, "limit", LISTED, 1, 1000)

    def listed() -> dict[str, Any]:
        data = [_view(jobs, record, with_files=False) for record in jobs.store.newest(states, limit)]
        return {"data": data, "counts": jobs.store.counts()}

    return json_response(await asyncio.to_thread(listed))


async def cancel(request: Request) -> Response:
    """Stop a job after the batch that runs; what is whole stays. One that has ended stays as it is."""
    jobs = _jobs_of(request)
    query.only(request, "id")
    return await _answer(jobs, await _record(request, jobs.cancel))


async def resume(request: Request) -> Response:
    """Go on with a job that was cancelled or failed; `retry_failed=true` then tries again what could not be read."""
    jobs = _jobs_of(request)
    query.only(request, "id", "retry_failed")
    record, again = await _record(request, jobs.store.get), query.switch(request, "retry_failed")
    resumed = await _found(jobs.resume, record, retry_failed=again)
    if resumed is None:
        raise RequestError(409, "job_not_ended", "this job has not ended: only one that has can be resumed.", "id")
    return await _answer(jobs, resumed)


async def remove(request: Request) -> Response:
    """Delete a job that has ended, with its results."""
    jobs = _jobs_of(request)
    query.only(request, "id")
    if not await asyncio.to_thread(jobs.remove, (await _record(request, jobs.store.get)).id):
        raise RequestError(409, "job_not_ended", "this job has not ended: cancel it first.", "id")
    return Response(status_code=204)


async def file(request: Request) -> Response:
    """One file of a job's results, by the name that the job gives."""
    jobs = _jobs_of(request)
    query.only(request, "id", "name")
    record, name = await _record(request, jobs.store.get), request.query_params.get("name", "")
    if name == MANIFEST:
        if manifest := await asyncio.to_thread(jobs.manifest, record):
            return json_response(manifest)
    elif name in (await asyncio.to_thread(jobs.results, record))[1]:
        return FileResponse(
            jobs.out(record.id) / name, media_type="application/octet-stream", filename=name.rpartition("/")[2]
        )
    raise RequestError(404, "no_such_file", "this job has no such file: its files are listed by /jobs?id=.", "name")


def _jobs_of(request: Request) -> Jobs:
    jobs: Jobs | None = request.app.state.jobs
    if jobs is None:
        raise RequestError(404, "no_jobs", "this server takes no jobs: its operator starts it with --jobs-root FOLDER.")
    return jobs


async def _record(request: Request, find: Callable[[str], Record | None]) -> Record:
    """The job that a request names, as `find` gives it."""
    id_ = request.query_params.get("id", "")
    record = await asyncio.to_thread(find, id_)
    if record is None:
        raise RequestError(404, "no_such_job", f"no job {id_[:40]!r} here.", "id")
    return record


async def _found(work: Any, *values: object, **named: object) -> Any:
    """Work beside the event loop that looks for a source."""
    try:
        return await asyncio.to_thread(work, *values, **named)
    except DataError as error:
        raise RequestError(400, "no_source", str(error), "source") from error


async def _answer(jobs: Jobs, record: Record) -> Response:
    return json_response(await asyncio.to_thread(_view, jobs, record))


def _view(jobs: Jobs, record: Record, *, with_files: bool = True) -> dict[str, Any]:
    """A job as its clients see it."""
    progress = jobs.progress(record)
    shown: dict[str, Any] = {
        "id": record.id,
        "state": record.state,
        "source": record.source,
        "options": record.options,
        "created": _time(record.created),
        "started": _time(record.started),
        "ended": _time(record.ended),
        "progress": _progress(progress) if progress else None,
        "error": record.message,
        "url": _url(record),
    }
    if record.state == "queued":
        shown["ahead"] = jobs.store.ahead(record)
    if with_files and record.state in ENDED:  # a list of files may be long, and be asked for every second
        rows, files = jobs.results(record)
        shown["rows"] = rows
        shown["files"] = [
            {"name": name, "bytes": size, "url": f"/jobs/file?{urlencode({'id': record.id, 'name': name})}"}
            for name, size in files.items()
        ]
    return shown


def _progress(found: dict[str, Any]) -> dict[str, Any]:
    """`extract.progress.ExtractProgress` with names that say their units."""
    return {
        "images": found["total"],
        "done": found["done"],
        "errors": found["errors"],
        "images_per_second": found["rate"],
        "waiting": found["waiting"],
        "seconds_left": found["left"],
    }


def _url(record: Record) -> str:
    return f"/jobs?{urlencode({'id': record.id})}"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
