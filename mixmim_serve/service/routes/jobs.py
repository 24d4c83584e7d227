"""POST /jobs, and the routes that act on a job. All holders of a key see all jobs.

A job is `mixmim extract` with this server's model. Its source lies below a root that the operator named, its results in
a folder of the server's own, from which they are downloaded by link.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from mixmim_serve.errors import DataError, quoted
from mixmim_serve.extract.folder import MANIFEST
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.jobs.pool import PoolFullError
from mixmim_serve.service.jobs.runner import JobRunner
from mixmim_serve.service.jobs.store import ENDED, JobRecord, is_disk_full
from mixmim_serve.service.options import FILE_NAME, JOB_ID, JOB_LIMIT, JOB_STATES, RETRY_FAILED
from mixmim_serve.service.request import check_options
from mixmim_serve.service.responses import json_response
from mixmim_serve.service.uploads import media_type, parse_json
from mixmim_serve.sources.patterns import SearchLimit

HOW_TO_SEND = 'send JSON such as {"source": "photos", "options": {"features": ["stage4"]}}.'
KEYS = ("source", "options")

Result = TypeVar("Result")

log = logging.getLogger(__name__)


async def create(request: Request) -> Response:
    """Queue a job, 201. Until it ends, the same request returns the same job, 200."""
    runner = _runner_of(request)
    check_options(request)
    if media_type(request) != "application/json":
        message = f"content type {quoted(media_type(request))} is not accepted: {HOW_TO_SEND}"
        raise RequestError(415, "unsupported_body", message)
    body = parse_json(await request.body(), HOW_TO_SEND)
    for name in body:
        if name not in KEYS:
            message = f"unknown key {quoted(name)}: the body takes {' and '.join(KEYS)}."
            raise RequestError(400, "unknown_key", message, name)
    source, options = body.get("source"), body.get("options", {})
    submitted = await _search(runner, lambda limit: runner.submit(source, options, limit))
    if submitted is None:
        message = f"{runner.settings.jobs_waiting} jobs are waiting already: try again when some have ended."
        raise RequestError(429, "too_many_jobs", message, headers={"Retry-After": "60"})
    record, is_new = submitted
    view = await _look(runner, lambda: _view(runner, record))
    return json_response(view, 201 if is_new else 200, {"Location": _url(record)})


async def show(request: Request) -> Response:
    """The job with this `id` and links to its results; without an id all jobs, the newest first."""
    runner = _runner_of(request)
    check_options(request)
    if JOB_ID.name in request.query_params:
        return await _respond(runner, await _record(request, runner.store.get))
    states, limit = JOB_STATES.read(request), JOB_LIMIT.read(request)

    def listing() -> dict[str, Any]:
        data = [_view(runner, record, with_files=False) for record in runner.store.newest(states, limit)]
        return {"data": data, "counts": runner.store.counts()}

    return json_response(await _look(runner, listing))


async def cancel(request: Request) -> Response:
    """Stop a job after its current batch and keep its complete shards; a job that has ended stays as it is."""
    runner = _runner_of(request)
    check_options(request)
    return await _respond(runner, await _record(request, runner.cancel))


async def resume(request: Request) -> Response:
    """Resume a cancelled or failed job; with `retry_failed=true` unreadable images are tried again afterwards."""
    runner = _runner_of(request)
    check_options(request)
    record, retry_failed = await _record(request, runner.store.get), RETRY_FAILED.read(request)
    resumed = await _search(runner, lambda limit: runner.resume(record, retry_failed, limit))
    if resumed is None:
        raise RequestError(409, "job_not_ended", "this job has not ended: only a job that has can be resumed.", "id")
    return await _respond(runner, resumed)


async def remove(request: Request) -> Response:
    """Delete a job that has ended, with its results."""
    runner = _runner_of(request)
    check_options(request)
    record = await _record(request, runner.store.get)
    if not await _look(runner, lambda: runner.remove(record.id)):
        raise RequestError(409, "job_not_ended", "this job has not ended: cancel it first.", "id")
    return Response(status_code=204)


async def file(request: Request) -> Response:
    """One file of a job's results, by the name that the job lists."""
    runner = _runner_of(request)
    check_options(request)
    record, name = await _record(request, runner.store.get), FILE_NAME.read(request)
    if name == MANIFEST:
        if manifest := await _look(runner, lambda: runner.manifest(record)):
            return json_response(manifest)
    elif name in (await _look(runner, lambda: runner.results(record)))[1]:
        path, download_name = runner.out(record.id) / name, name.rpartition("/")[2]
        return FileResponse(path, media_type="application/octet-stream", filename=download_name)
    raise RequestError(404, "no_such_file", "this job has no such file: /jobs?id= lists its files.", "name")


def _runner_of(request: Request) -> JobRunner:
    runner: JobRunner | None = request.app.state.jobs
    if runner is None:
        message = "this server takes no jobs: its operator must start it with --jobs-root FOLDER."
        raise RequestError(404, "no_jobs", message)
    return runner


async def _record(request: Request, find: Callable[[str], JobRecord | None]) -> JobRecord:
    """The job that a request names, as `find` gives it.

    Raises:
        RequestError: 404 when there is none.
    """
    job_id = JOB_ID.read(request)
    record = await _look(_runner_of(request), lambda: find(job_id))
    if record is None:
        raise RequestError(404, "no_such_job", f"unknown job {quoted(job_id)}.", "id")
    return record


async def _search(runner: JobRunner, work: Callable[[SearchLimit], Result]) -> Result:
    """Run work that looks for a source; it ends with its request.

    Raises:
        RequestError: 400 when the source does not exist or is not found in time, or as `_failures`.
    """
    cancelled = threading.Event()
    try:
        with _failures():
            return await runner.searches.run(lambda: work(runner.limit(cancelled)))
    except DataError as error:
        if runner.closing:
            message = "the server is shutting down: try again in a second."
            raise RequestError(503, "not_ready", message, headers={"Retry-After": "1"}) from error
        raise RequestError(400, "no_source", str(error), "source") from error
    finally:
        cancelled.set()


async def _look(runner: JobRunner, work: Callable[[], Result]) -> Result:
    """Run work that reads or changes the list of jobs or their folders; raises as `_failures`."""
    with _failures():
        return await runner.looks.run(work)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn failures of the list of jobs and of its disk into responses.

    Raises:
        RequestError: 429 when too many requests wait for the list, 507 when its disk is full, 503 for its other
            failures.
    """
    try:
        yield
    except PoolFullError:
        message = "too many requests for jobs are waiting: try again in a few seconds."
        raise RequestError(429, "too_many_jobs", message, headers={"Retry-After": "5"}) from None
    except (sqlite3.Error, OSError) as error:
        log.exception("the list of jobs failed")
        if is_disk_full(error):
            message = "the server has no space left for its list of jobs: its operator must free some."
            raise RequestError(507, "disk_full", message) from error
        message = "the list of jobs cannot be used at present: try again later; the server's log has the reason."
        raise RequestError(503, "jobs_unavailable", message, headers={"Retry-After": "5"}) from error


async def _respond(runner: JobRunner, record: JobRecord) -> Response:
    return json_response(await _look(runner, lambda: _view(runner, record)))


def _view(runner: JobRunner, record: JobRecord, *, with_files: bool = True) -> dict[str, Any]:
    """A job as clients see it."""
    view: dict[str, Any] = {
        "id": record.id,
        "state": record.state,
        "source": record.source,
        "options": record.options,
        "created": _timestamp(record.created),
        "started": _timestamp(record.started),
        "ended": _timestamp(record.ended),
        "progress": _progress(runner.progress(record)),
        "error": record.message,
        "url": _url(record),
    }
    if record.state == "queued":
        view["ahead"] = runner.store.ahead(record)
    if with_files and record.state in ENDED:  # the list may be long, and running jobs are polled every second
        rows, files = runner.results(record)
        view["rows"] = rows
        view["files"] = [
            {"name": name, "bytes": size, "url": f"/jobs/file?{urlencode({'id': record.id, 'name': name})}"}
            for name, size in files.items()
        ]
    return view


def _progress(values: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of an extraction's progress under names that say their units; None before the first batch."""
    if not values:
        return None
    return {
        "images": values["total"],
        "done": values["done"],
        "errors": values["errors"],
        "images_per_second": values["rate"],
        "waiting": values["waiting"],
        "seconds_left": values["left"],
        "passed_over": values.get("passed_over", {}),  # absent in what earlier versions stored
    }


def _url(record: JobRecord) -> str:
    return f"/jobs?{urlencode({'id': record.id})}"


def _timestamp(seconds: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
