"""Signals that ask long work to end: the work ends well, and its helpers wait for it."""

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
    """An event that these signals set instead of ending the process; only the main thread may ask for signals.

    Ctrl-C again, a second later or more, ends it at once: `torchrun` hands on the first one, which comes twice then.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    since = 0.0

    def stop(number: int, _frame: object) -> None:
        nonlocal since
        if number == signal.SIGINT and stopping.is_set() and time.monotonic() - since > 1:
            raise KeyboardInterrupt
        since = since or time.monotonic()
        stopping.set()

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(_worker: int) -> None:
    """Let a loader's worker end with its own process only; for `worker_init_fn`.

    systemd, Slurm, `timeout` and a terminal signal every process of a run. torch stops a run one of whose workers died,
    in the middle of a step: nothing could be saved any more.
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
