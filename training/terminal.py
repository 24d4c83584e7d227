"""What a run says and hears: its progress bar, signals to stop, and whether a compiler is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.meter import Metrics


def in_words(metrics: Metrics) -> str:
    """Metrics for a progress bar."""
    return (
        f"loss {metrics.loss:.4f}  {metrics.rate:.0f} images/s  {metrics.waiting:.0%} waiting  {metrics.memory:.1f} GB"
    )


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs; on a CPU that is a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return device.type != "cpu" or any(name and shutil.which(name) for name in compilers)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets instead of ending the process; only the main thread may ask for signals.

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

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
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


def progress_bar(console: Console) -> Progress:
    """Steps, what the last line of the log says, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
