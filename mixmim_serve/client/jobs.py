"""Extraction jobs on a server: `client.jobs.start("photos")`, `wait`, `download`; awaitable in the async client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from mixmim_serve.client.answers import Reply, read_json
from mixmim_serve.client.calls import JSON, Call
from mixmim_serve.client.retry import Policy, Steps, Wait, attempts
from mixmim_serve.errors import ServerError
from mixmim_serve.files import atomic_path

Value = TypeVar("Value")

ENDED = ("done", "failed", "cancelled")
CHUNK = 16 * 2**20  # bytes per request of a download, retried together


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """An output file of a job."""

    name: str  # with `/` between parts
    size: int  # in bytes


@dataclass(frozen=True, kw_only=True)
class Job:
    """The state of a job at the time of the response."""

    id: str
    state: str  # queued, running, cancelling, done, failed, cancelled
    source: str
    error: str | None  # of a failed job
    progress: Mapping[str, Any] | None  # images, done, errors, images_per_second, waiting, seconds_left, passed_over
    files: tuple[JobFile, ...]  # of a job that has ended
    about: Mapping[str, Any]  # the complete response

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self.state in ENDED


class Drive(Protocol):
    """Carries out steps until they return a result."""

    def __call__(self, steps: Steps[Value], /) -> Value:
        """Carry out the steps."""


class AsyncDrive(Protocol):
    """The asynchronous `Drive`."""

    def __call__(self, steps: Steps[Value], /) -> Awaitable[Value]:
        """Carry out the steps."""


class Jobs:
    """The jobs of a `Client`; calls raise RefusedError (unknown job, no jobs), UnavailableError and ServerError."""

    def __init__(self, drive: Drive, policy: Policy) -> None:
        self._drive, self._policy = drive, policy

    def start(self, source: str, **options: Any) -> Job:
        """Start a job, with options such as `features` and `dtype`; returns an unfinished job that does the same."""
        return self._drive(attempts(_start(source, options), self._policy))

    def get(self, job: str) -> Job:
        """The job with this id."""
        return self._drive(attempts(_by_id("/jobs", job), self._policy))

    def list(self, states: Sequence[str] = ()) -> Sequence[Job]:
        """The newest 1,000 jobs, in any of these states or in all."""
        return self._drive(attempts(_list(states), self._policy))

    def cancel(self, job: str) -> Job:
        """Cancel a job; its complete shards stay."""
        return self._drive(attempts(_by_id("/jobs/cancel", job, "POST"), self._policy))

    def resume(self, job: str, *, retry_failed: bool = False) -> Job:
        """Resume a job that has ended; `retry_failed` retries the images that could not be read."""
        return self._drive(attempts(_by_id("/jobs/resume", job, "POST", retry_failed=retry_failed), self._policy))

    def delete(self, job: str) -> None:
        """Delete a job that has ended, with its output."""
        return self._drive(attempts(_delete(job), self._policy))

    def wait(self, job: str, *, every: float = 1.0, progress: Callable[[Job], None] = lambda job: None) -> Job:
        """Wait until the job has ended, polling it `every` so many seconds; `progress` is called with each state."""
        return self._drive(_wait(job, every, progress, self._policy))

    def download(self, job: str, folder: str | Path) -> Path:
        """Download a job's output to a folder; data files that exist with the right size are skipped."""
        return self._drive(_download(job, Path(folder), self._policy))


class AsyncJobs:
    """The jobs of an `AsyncClient`; see `Jobs`."""

    def __init__(self, drive: AsyncDrive, policy: Policy) -> None:
        self._drive, self._policy = drive, policy

    async def start(self, source: str, **options: Any) -> Job:
        """See `Jobs.start`."""
        return await self._drive(attempts(_start(source, options), self._policy))

    async def get(self, job: str) -> Job:
        """See `Jobs.get`."""
        return await self._drive(attempts(_by_id("/jobs", job), self._policy))

    async def list(self, states: Sequence[str] = ()) -> Sequence[Job]:
        """See `Jobs.list`."""
        return await self._drive(attempts(_list(states), self._policy))

    async def cancel(self, job: str) -> Job:
        """See `Jobs.cancel`."""
        return await self._drive(attempts(_by_id("/jobs/cancel", job, "POST"), self._policy))

    async def resume(self, job: str, *, retry_failed: bool = False) -> Job:
        """See `Jobs.resume`."""
        return await self._drive(attempts(_by_id("/jobs/resume", job, "POST", retry_failed=retry_failed), self._policy))

    async def delete(self, job: str) -> None:
        """See `Jobs.delete`."""
        return await self._drive(attempts(_delete(job), self._policy))

    async def wait(self, job: str, *, every: float = 1.0, progress: Callable[[Job], None] = lambda job: None) -> Job:
        """See `Jobs.wait`."""
        return await self._drive(_wait(job, every, progress, self._policy))

    async def download(self, job: str, folder: str | Path) -> Path:
        """See `Jobs.download`."""
        return await self._drive(_download(job, Path(folder), self._policy))


def _start(source: str, options: Mapping[str, Any]) -> Call[Job]:
    return Call("/jobs", _read, accept=JSON, method="POST", body={"source": source, "options": options})


def _by_id(path: str, job: str, method: str = "GET", *, retry_failed: bool = False) -> Call[Job]:
    params = {"id": job} | ({"retry_failed": "true"} if retry_failed else {})
    return Call(path, _read, params=params, accept=JSON, method=method)


def _list(states: Sequence[str]) -> Call[Sequence[Job]]:
    params = {"limit": "1000"} | ({"state": ",".join(states)} if states else {})
    return Call("/jobs", lambda reply: tuple(map(_job, read_json(reply)["data"])), params=params, accept=JSON)


def _delete(job: str) -> Call[None]:
    return Call("/jobs", lambda reply: None, params={"id": job}, method="DELETE")


def _wait(job: str, every: float, progress: Callable[[Job], None], policy: Policy) -> Steps[Job]:
    while True:
        current = yield from attempts(_by_id("/jobs", job), policy)
        progress(current)
        if current.ended:
            return current
        yield Wait(every)


def _download(job: str, folder: Path, policy: Policy) -> Steps[Path]:
    current = yield from attempts(_by_id("/jobs", job), policy)
    for file in current.files:
        target = folder / _inside(file.name)
        if "/" not in file.name or not target.exists() or target.stat().st_size != file.size:
            with atomic_path(target) as temporary, temporary.open("wb") as written:
                for chunk in _Chunks(job, file.name):
                    reply = yield from attempts(chunk, policy)
                    written.write(reply.content)
    return folder


class _Chunks:
    """The calls that download one file."""

    def __init__(self, job: str, name: str) -> None:
        self.params, self.done, self.size = {"id": job, "name": name}, 0, 1

    def __iter__(self) -> Iterator[Call[Reply]]:
        while self.done < self.size:
            headers = {"Range": f"bytes={self.done}-{self.done + CHUNK - 1}"}
            yield Call("/jobs/file", self._read, params=self.params, accept="*/*", headers=headers)

    def _read(self, reply: Reply) -> Reply:
        """Track the progress of the download; a response other than 206 has the complete file."""
        self.size = int(reply.headers["content-range"].rpartition("/")[2]) if reply.status == 206 else 0
        self.done += len(reply.content)
        return reply


def _inside(name: str) -> PurePosixPath:
    """A file name from a server as a relative path.

    Raises:
        ServerError: for a path that would leave the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in name:
        raise ServerError(
            f"the server lists a file {name!r}, whose name is not safe to write: check that the URL is right."
        )
    return path


def _read(reply: Reply) -> Job:
    return _job(read_json(reply))


def _job(values: Mapping[str, Any]) -> Job:
    files = tuple(JobFile(name=file["name"], size=file["bytes"]) for file in values.get("files", ()))
    shared = {name: values[name] for name in ("id", "state", "source", "error", "progress")}
    return Job(files=files, about=values, **shared)
