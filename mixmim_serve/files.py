"""Atomic files and folders: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
