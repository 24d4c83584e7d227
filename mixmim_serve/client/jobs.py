"""Jobs of a server: `client.jobs.start("photos")`, `wait`, `download`; the same to `await` in the async client."""

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

Made = TypeVar("Made")

ENDED = ("done", "failed", "cancelled")
PIECE = 16 * 2**20  # bytes of a file that are asked for at once, and again if they are lost


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A file of results."""

    name: str  # with `/` between parts
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was when it was asked for."""

    id: str
    state: str  # queued, running, cancelling, done, failed, cancelled
    source: str
    error: str | None  # of one that failed
    progress: Mapping[str, Any] | None  # images, done, errors, images_per_second, waiting, seconds_left
    files: tuple[JobFile, ...]  # once it has ended
    about: Mapping[str, Any]  # the whole answer

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ENDED


class Drive(Protocol):
    """Does what steps say until they have a result."""

    def __call__(self, steps: Steps[Made], /) -> Made:
        """The result."""


class AsyncDrive(Protocol):
    """The same, beside other work."""

    def __call__(self, steps: Steps[Made], /) -> Awaitable[Made]:
        """The result."""


class Jobs:
    """Of a `Client`. Every call may raise RefusedError (no such job, no jobs), UnavailableError and ServerError."""

    def __init__(self, drive: Drive, policy: Policy) -> None:
        self._drive, self._policy = drive, policy

    def start(self, source: str, **options: Any) -> Job:
        """A new job, with `features`, `dtype` and so on; the one that does the same if it has not ended."""
        return self._drive(attempts(_start(source, options), self._policy))

    def get(self, job: str) -> Job:
        """The job with this id."""
        return self._drive(attempts(_by_id("/jobs", job), self._policy))

    def list(self, states: Sequence[str] = ()) -> Sequence[Job]:
        """The newest 1,000 jobs, of these states, or all."""
        return self._drive(attempts(_list(states), self._policy))

    def cancel(self, job: str) -> Job:
        """Stop it; what is whole stays."""
        return self._drive(attempts(_by_id("/jobs/cancel", job, "POST"), self._policy))

    def resume(self, job: str, *, retry_failed: bool = False) -> Job:
        """Go on with one that has ended; with `retry_failed` images that could not be read are tried again."""
        return self._drive(attempts(_by_id("/jobs/resume", job, "POST", retry_failed=retry_failed), self._policy))

    def delete(self, job: str) -> None:
        """Delete one that has ended, with its results."""
        return self._drive(attempts(_delete(job), self._policy))

    def wait(self, job: str, *, every: float = 1.0, progress: Callable[[Job], None] = lambda job: None) -> Job:
        """The job once it has ended, however; asked `every` so many seconds, `progress` hears each answer."""
        return self._drive(_wait(job, every, progress, self._policy))

    def download(self, job: str, folder: str | Path) -> Path:
        """Its results in a folder; files that are there already are left alone, but for the lists."""
        return self._drive(_download(job, Path(folder), self._policy))


class AsyncJobs:
    """Of an `AsyncClient`; see `Jobs`."""

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
        found = yield from attempts(_by_id("/jobs", job), policy)
        progress(found)
        if found.ended:
            return found
        yield Wait(every)


def _download(job: str, folder: Path, policy: Policy) -> Steps[Path]:
    found = yield from attempts(_by_id("/jobs", job), policy)
    for file in found.files:
        target = folder / _inside(file.name)
        if "/" not in file.name or not target.exists() or target.stat().st_size != file.size:
            with atomic_path(target) as temporary, temporary.open("wb") as written:
                for piece in _Pieces(job, file.name):
                    reply = yield from attempts(piece, policy)
                    written.write(reply.content)
    return folder


class _Pieces:
    """The calls that bring one file."""

    def __init__(self, job: str, name: str) -> None:
        self.params, self.done, self.size = {"id": job, "name": name}, 0, 1

    def __iter__(self) -> Iterator[Call[Reply]]:
        while self.done < self.size:
            wanted = {"Range": f"bytes={self.done}-{self.done + PIECE - 1}"}
            yield Call("/jobs/file", self._read, params=self.params, accept="*/*", headers=wanted)

    def _read(self, reply: Reply) -> Reply:
        """Note how far the file has come; an answer that is not a part is the whole."""
        self.size = int(reply.headers["content-range"].rpartition("/")[2]) if reply.status == 206 else 0
        self.done += len(reply.content)
        return reply


def _inside(name: str) -> PurePosixPath:
    """A name from a server as a path that stays below a folder.

    Raises:
        ServerError: it would not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in name:
        raise ServerError(f"the server names a file {name!r}, which is none that could be written here.")
    return path


def _read(reply: Reply) -> Job:
    return _job(read_json(reply))


def _job(found: Mapping[str, Any]) -> Job:
    files = tuple(JobFile(name=file["name"], size=file["bytes"]) for file in found.get("files", ()))
    shared = {name: found[name] for name in ("id", "state", "source", "error", "progress")}
    return Job(files=files, about=found, **shared)
