"""What is measured between two log lines, without waiting for the device, and how a terminal shows it."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

from training.distributed import World


@dataclass(frozen=True)
class Metrics:
    """Means since the last log line."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float  # over all parameters
    rate: float  # images/s, over all processes; 0 when no step was counted
    waiting: float  # share of the time that this process waited for data
    memory: float  # GB, peak so far: of the device, or of this process on a CPU


@dataclass
class Meter:
    """Collects values between two log lines; they stay on their device until `read`."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    images: int = 0
    waited: float = 0.0  # seconds
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, images: int) -> None:
        """Add one step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.images += images

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """A block whose time and images do not count in the rate: a step in which the network is compiled."""
        images, waited, began = self.images, self.waited, time.perf_counter()
        yield
        self.images, self.waited = images, waited
        self.since += time.perf_counter() - began

    def nonfinite(self) -> int | None:
        """Steps since the first non-finite gradient (1: the last step), or None; waits for the device."""
        if not self.norms:
            return None
        bad = (~torch.stack(self.norms).isfinite()).nonzero()
        return len(self.norms) - int(bad[0]) if len(bad) else None

    def read(self, step: int, epoch: float, lr: float, world: World) -> Metrics:
        """The means; waits for the device and the other processes."""
        loss = float(world.mean(torch.stack(self.losses).mean()))
        norm = float(torch.stack(self.norms).mean())
        seconds = max(time.perf_counter() - self.since, 1e-9)  # nothing may have been counted
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
        """The values that a resumed run needs for its next log line."""
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
    """Peak memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_words(metrics: Metrics) -> str:
    """The metrics as one line for a progress bar."""
    rate = f"{metrics.rate:.0f} images/s  {metrics.waiting:.0%} waiting  " if metrics.rate else ""
    return f"loss {metrics.loss:.4f}  {rate}{metrics.memory:.1f} GB"


def left_in_words(images: int, rate: float) -> str:
    """The time that this many images take, as hours, minutes and seconds; empty when the rate is not known yet."""
    return str(datetime.timedelta(seconds=round(images / rate))) if rate else ""


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can run; on a CPU it needs a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return device.type != "cpu" or any(name and shutil.which(name) for name in compilers)


def announcer(progress: Progress, bar: TaskID, console: Console) -> Callable[[str, bool], None]:
    """What shows a line in the bar, and prints it if it is worth keeping or nobody sees the bar."""

    def say(text: str, lasting: bool) -> None:
        progress.update(bar, text=text)
        if lasting or not console.is_terminal:
            console.log(text)

    return say


def progress_bar(console: Console) -> Progress:
    """A bar with steps, the latest metrics, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="progress.remaining"),  # rich's own would count compiling as steps
        console=console,
    )
