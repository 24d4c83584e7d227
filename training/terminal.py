"""What a run says, and whether a compiler is there."""

from __future__ import annotations

import os
import shutil

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
