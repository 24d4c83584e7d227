"""Signal handling for long runs: finish cleanly, keep worker processes alive until then, and no longer."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # of Linux's prctl
PARENT_SECONDS = 0.5  # between two looks at the parent, where the kernel does not tell


class Stop(threading.Event):
    """Set by a signal; the work that it stops looks at it when it can, unless it is within `at_once`."""

    urgent = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block in which the first signal raises KeyboardInterrupt."""
        self.urgent = True
        try:
            yield
        finally:
            self.urgent = False


@contextlib.contextmanager
def stop_signals(*numbers: signal.Signals) -> Iterator[Stop]:
    """An event that these signals set instead of ending the process; outside the main thread it is never set.

    A second Ctrl-C, at least a second later, raises KeyboardInterrupt. (`torchrun` forwards the first, which then
    arrives twice.)
    """
    stopping = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    first = 0.0

    def stop(number: int, _frame: object) -> None:
        nonlocal first
        if stopping.urgent:
            stopping.urgent = False  # what cleans up is not interrupted again
            stopping.set()
            first = time.monotonic()
            raise KeyboardInterrupt
        if number == signal.SIGINT and stopping.is_set() and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        stopping.set()

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outlive_signals(_worker: int) -> None:
    """Make a data loader's worker ignore SIGINT, and SIGTERM unless its parent sends it; for `worker_init_fn`.

    systemd, Slurm, `timeout` and terminals signal every process of a run. When a worker dies, torch aborts the run in
    the middle of a step, before a checkpoint can be saved. When the parent itself is killed, the worker is too.
    """
    parent = multiprocessing.parent_process()
    if parent and parent.pid and multiprocessing.get_start_method(allow_none=True) != "forkserver":
        die_with_parent(parent.pid)  # a fork server ends with the run by itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":  # no sigwaitinfo
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while sys.platform == "linux" and signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def die_with_parent(parent: int) -> None:
    """Kill this process as soon as the process `parent`, which started it, has ended, however that ended.

    An orphan would hold locks, memory and devices that the next run needs. On Linux the kernel sees to it, when the
    thread that started this process ends; elsewhere a thread looks twice a second.
    """
    if sys.platform == "win32":
        return  # a process there keeps the number of a parent that has ended
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_outlive_no_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _outlive_no_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
