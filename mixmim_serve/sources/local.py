"""Local files that sources read: regular ones only, and in a confined process only those below its roots.

A process that reads for others calls `confine` once; from then on every function here, whoever calls it, refuses what
lies outside.
"""

from __future__ import annotations

import contextlib
import os
import stat as modes
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import IO, Protocol

from mixmim_serve.errors import OutsideError
from mixmim_serve.files import open_regular
from mixmim_serve.sources.names import is_hidden


class Access(Protocol):
    """How local files are reached."""

    def open(self, place: str) -> IO[bytes]:
        """A regular file; see `open_file`."""

    def stat(self, place: str) -> os.stat_result:
        """What a place leads to, links followed."""

    def scan(self, place: str) -> contextlib.AbstractContextManager[Iterator[os.DirEntry[str]]]:
        """The entries of a folder."""

    def allows_url(self, url: str) -> bool:
        """Whether a URL may be read."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Entry:
    """A name in a folder."""

    name: str
    is_link: bool
    is_folder: bool  # False for a link


class _Open:
    """Everything that the user of this process may read."""

    def open(self, place: str) -> IO[bytes]:
        return open_regular(place)

    def stat(self, place: str) -> os.stat_result:
        return os.stat(place)

    def scan(self, place: str) -> contextlib.AbstractContextManager[Iterator[os.DirEntry[str]]]:
        return os.scandir(place)

    def allows_url(self, url: str) -> bool:
        return True


_of_process: Access = _Open()
_of_block: ContextVar[Access | None] = ContextVar("access", default=None)


def confine(access: Access) -> None:
    """Let this process read only what `access` allows, in all threads, until it ends."""
    global _of_process
    _of_process = access


@contextlib.contextmanager
def confined(access: Access) -> Iterator[None]:
    """Let this thread read only what `access` allows, for the length of a block."""
    token = _of_block.set(access)
    try:
        yield
    finally:
        _of_block.reset(token)


def current() -> Access:
    """What this thread may read."""
    return _of_block.get() or _of_process


def is_confined() -> bool:
    """Whether this process reads for others."""
    return not isinstance(current(), _Open)


def open_file(place: str) -> IO[bytes]:
    """A regular file to read; pipes and devices are refused without blocking.

    Raises:
        OSError: it is missing, not readable or not a regular file.
        OutsideError: it lies outside the roots of a confined process.
    """
    return current().open(place)


def stat(place: str) -> os.stat_result:
    """What a place leads to; raises as `open_file`."""
    return current().stat(place)


def allows_url(url: str) -> bool:
    """Whether this process may read a URL."""
    return current().allows_url(url)


def exists(place: str) -> bool:
    """Whether a place leads to something that this process may read."""
    return identity(place) is not None


def is_folder(place: str) -> bool:
    """Whether a place leads to a folder."""
    try:
        return modes.S_ISDIR(stat(place).st_mode)
    except (OSError, ValueError, OutsideError):
        return False


def identity(place: str) -> tuple[int, int] | None:
    """Device and inode of what a place leads to; None when there is nothing."""
    try:
        status = stat(place)
    except (OSError, ValueError, OutsideError):  # ValueError: a null byte
        return None
    return status.st_dev, status.st_ino


def entries(folder: str) -> Iterator[Entry]:
    """What lies in a folder; nothing in one that cannot be read."""
    with contextlib.suppress(OSError, ValueError, OutsideError), current().scan(folder) as found:
        for entry in found:
            yield Entry(entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False))


def walk(folder: str) -> Iterator[str]:
    """Every file below a folder by its relative name, hidden ones and links to folders left out, in no order."""
    pending = [""]
    while pending:
        below = pending.pop()
        for entry in entries(f"{folder}/{below}"):
            name = below + entry.name
            if is_hidden(entry.name):
                continue
            if entry.is_folder:
                pending.append(f"{name}/")
            elif not (entry.is_link and is_folder(f"{folder}/{name}")):
                yield name
