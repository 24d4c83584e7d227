"""Signal handling for long runs: finish cleanly, and keep worker processes alive until then."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that these signals set instead of ending the process; outside the main thread it is never set.

    A second Ctrl-C, at least a second later, raises KeyboardInterrupt. (`torchrun` forwards the first, which then
    arrives twice.)
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    first = 0.0

    def stop(number: int, _frame: object) -> None:
        nonlocal first
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
    the middle of a step, before a checkpoint can be saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":  # no sigwaitinfo
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while sys.platform == "linux" and signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
