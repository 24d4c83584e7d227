"""What is measured between two log lines, without waiting for the device, and how a terminal shows it."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from training.distributed import World


@dataclass(frozen=True)
class Metrics:
    """Means since the last line of the log."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float  # of all gradients together
    rate: float  # images/s, over all processes
    waiting: float  # share of the time in which this process waited for data
    memory: float  # GB, the most so far: the device's, or this process's where that is the CPU


@dataclass
class Meter:
    """Values stay on their device until they are read."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0  # seconds
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, images: int) -> None:
        """One step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.images += images

    def nonfinite(self) -> int | None:
        """How many steps ago the first gradient that is not finite came (1: in the last step); waits for the device."""
        if not self.norms:
            return None
        bad = (~torch.stack(self.norms).isfinite()).nonzero()
        return len(self.norms) - int(bad[0]) if len(bad) else None

    def read(self, step: int, epoch: float, lr: float, world: World) -> Metrics:
        """The means; waits for the device and for the other processes."""
        loss = float(world.mean(torch.stack(self.losses).mean()))
        norm = float(torch.stack(self.norms).mean())
        seconds = time.perf_counter() - self.since
        return Metrics(
            step,
            round(epoch, 4),
            round(loss, 6),
            lr,
            round(norm, 4),
            round(self.images * world.size / seconds, 1),
            round(self.waited / seconds, 3),
            round(peak_memory(world.device) / 1e9, 2),
        )

    def state(self) -> dict[str, list[float] | int]:
        """What a resumed run needs to write the next line as if nothing had happened."""
        return {
            "losses": [float(x) for x in self.losses],
            "norms": [float(x) for x in self.norms],
            "images": self.images,
        }

    @classmethod
    def from_state(cls, state: dict[str, list[float] | int], device: torch.device) -> Meter:
        """The inverse of `state`."""
        values = {
            name: [torch.tensor(value, device=device) for value in state[name]]  # type: ignore[union-attr]
            for name in ("losses", "norms")
        }
        return cls(**values, images=int(state["images"]))  # type: ignore[arg-type]


def peak_memory(device: torch.device) -> int:
    """Bytes, at most, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
