"""Atomic files and folders, written under a temporary name, then renamed; and files that are safe to open."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Without O_NONBLOCK, opening a named pipe waits for a writer. It changes nothing for regular files.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `target` when the block succeeds, and deleted when it raises.

    It lies in the same folder, because a rename is atomic only within one file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp gives 0600, which nobody else could read
        _flush(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder that replaces `target` when the block succeeds, and is deleted when it raises."""
    target = target.absolute()  # "." has no name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        yield folder
        _move(folder, target)


def _move(folder: Path, target: Path) -> None:
    """Replace `target`; the old folder is moved aside first, so that one of the two always exists."""
    old = folder.parent / f"{target.name}.old"
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _flush(path: Path) -> None:
    """Flush to disk: a file that was only renamed may be empty after a power failure."""
    with path.open("r+b") as file:  # Windows flushes only writable files
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> IO[bytes]:
    """A regular file, opened for reading; a pipe or device is refused without blocking or reading from it.

    `follow=False` also refuses a symbolic link as the last part of the path.

    Raises:
        OSError: the file is missing, not readable or not a regular file.
    """
    if not follow and os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))
    return regular(os.open(path, READ_FLAGS | (0 if follow else NO_LINK)), str(path))


def regular(handle: int, name: str) -> IO[bytes]:
    """A file object that owns an open handle.

    Raises:
        OSError: the handle is not of a regular file; it is closed.
    """
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    raise OSError(errno.EINVAL, "it is not a regular file", name)


def read_bounded(path: str | os.PathLike[str], limit: int, *, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; see `open_regular`.

    Raises:
        OSError: see `open_regular`.
        ValueError: the file is larger.
    """
    with open_regular(path, follow=follow) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data
