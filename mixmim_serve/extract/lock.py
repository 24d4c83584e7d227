"""One run at a time in a folder of results.

Locally the operating system holds the lock and lets go of it when the process ends, however it ends. Object stores
have no locks: there a small object says who writes and when it last said so; it is believed for `LEASE` seconds. Two
runs that begin within the same second may both pass; they would write the same bytes under the same names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from mixmim_serve.errors import InUseError, OutputError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.locks import LOCK, lock_folder

LEASE = 60.0  # seconds; renewed three times as often


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        InUseError: another run holds it.
    """
    with _lease(folder) if folder.is_url else _file_lock(folder):
        yield


@contextlib.contextmanager
def _file_lock(folder: Folder) -> Iterator[None]:
    path = Path(folder.place)
    new = not path.exists()
    lock = lock_folder(path)
    try:
        yield
    finally:
        lock.release()
        if new and [each.name for each in path.iterdir()] == [LOCK]:  # the run failed before it wrote anything
            shutil.rmtree(path)


@contextlib.contextmanager
def _lease(folder: Folder) -> Iterator[None]:
    me: dict[str, str | int] = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}
    _refuse_if_held(folder)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE / 3):
            with contextlib.suppress(OutputError):  # of a network that is away for a moment
                _sign(folder, me)

    _sign(folder, me)
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OutputError):
            folder.remove(LOCK)


def _sign(folder: Folder, me: dict[str, str | int]) -> None:
    folder.write_bytes(LOCK, json.dumps(me | {"time": time.time()}).encode())


def _refuse_if_held(folder: Folder) -> None:
    held = folder.read_bytes(LOCK)
    if held is None:
        return
    holder = json.loads(held)
    age = time.time() - holder["time"]
    here = holder["host"] == socket.gethostname() and holder["pid"] != os.getpid()
    if age < LEASE and not (here and not _runs(holder["pid"])):
        raise InUseError(
            f"another run ({holder['host']}, process {holder['pid']}) wrote to {folder.place} {age:.0f} seconds ago: "
            f"wait for it or, if it was killed, for {LEASE - age:.0f} seconds."
        )


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True
