"""What a run says and hears: its progress bar, SIGTERM, and whether a compiler is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
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
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process; only the main thread may ask for signals."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


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
