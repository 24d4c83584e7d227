"""One run at a time in an output folder.

A local folder is locked with `mixmim_serve.locks`. Object stores have no locks: there a small object names the writer
and when it last renewed its lease, which is valid for `LEASE` seconds. Two runs that start within the same second may
both pass; they would write the same bytes under the same names.
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
    """Hold the folder's lock or lease.

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
        if new and [entry.name for entry in path.iterdir()] == [LOCK]:  # the run failed before it wrote anything
            shutil.rmtree(path)


@contextlib.contextmanager
def _lease(folder: Folder) -> Iterator[None]:
    owner: dict[str, str | int] = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}
    _refuse_if_held(folder)
    stopped = threading.Event()

    def keep_renewing() -> None:
        while not stopped.wait(LEASE / 3):
            with contextlib.suppress(OutputError):  # the network may be down for a moment
                _renew(folder, owner)

    _renew(folder, owner)
    thread = threading.Thread(target=keep_renewing, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        with contextlib.suppress(OutputError):
            folder.remove(LOCK)


def _renew(folder: Folder, owner: dict[str, str | int]) -> None:
    folder.write_bytes(LOCK, json.dumps(owner | {"time": time.time()}).encode())


def _refuse_if_held(folder: Folder) -> None:
    lease = folder.read_bytes(LOCK)
    if lease is None:
        return
    holder = json.loads(lease)
    age = time.time() - holder["time"]
    is_local = holder["host"] == socket.gethostname() and holder["pid"] != os.getpid()
    if age < LEASE and not (is_local and not _is_running(holder["pid"])):
        raise InUseError(
            f"another run ({holder['host']}, process {holder['pid']}) wrote to {folder.place} {age:.0f} seconds ago: "
            f"wait for it or, if it was killed, for {LEASE - age:.0f} seconds."
        )


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    return True
