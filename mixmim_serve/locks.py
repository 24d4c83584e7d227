"""One process at a time in a folder.

The operating system holds the lock and releases it when the process ends, however it ends. On a network file system it
excludes other machines only where that file system passes `flock` on to its server.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixmim_serve.errors import InUseError, OutputError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = ".lock"  # the file that is locked; it stays in the folder


def lock_folder(path: Path) -> FileLock:
    """Lock a local folder, created if missing, until `release` is called, by any thread, or the process ends.

    Raises:
        InUseError: another process holds the lock.
        OutputError: the folder cannot be written to, or filelock is not installed.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise OutputError("filelock is not installed: run pip install 'mixmim-serve[extract]'.") from error
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, blocking=False, thread_local=False)
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"another run is writing to {path}: wait for it, or choose another folder.") from error
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}.") from error
    return lock
