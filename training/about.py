"""What a run says about itself: for config.json and provenance, and as lines for a terminal."""

from __future__ import annotations

import sys
from typing import Any

import torch

from mixmim_serve.sources import Source
from mixmim_serve.version import __version__
from training.distributed import World
from training.meter import Metrics, in_words
from training.task import Task


def metadata(task: Task, source: Source, fingerprint: str, world: World) -> dict[str, Any]:
    """The content of config.json besides the configuration."""
    return {
        "task": task.name,
        "start": task.start,
        **({"origin": dict(task.origin)} if task.origin else {}),
        "images": {"source": source.name, "count": len(source.keys), "fingerprint": fingerprint},
        "processes": world.size,
        "command": sys.argv,
        "versions": {"mixmim-serve": __version__, "torch": torch.__version__},
    }


def plan(task: Task, images: int, steps: int, world: World, done: int = 0, changed: str = "") -> str:
    """One line about the run ahead, with `steps` in an epoch, `done` of the run and settings `changed` since."""
    model = task.objective.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes = f"{world.size} x " if world.size > 1 else ""
    line = (
        f"{task.name}: {parameters / 1e6:.1f} M parameters at {model.arch.image_size} px on "
        f"{processes}{world.device.type}; {images} images, {task.config.epochs} epochs of {steps} steps"
    )
    line += f", resumed after step {done}" if done else ""
    return line + (f" with {changed}" if changed else "")


def summary(epoch: int, epochs: int, last: Metrics | None, unreadable: int) -> str:
    """One line after an epoch, for terminals and log files."""
    line = f"epoch {epoch + 1}/{epochs}"
    if last:
        line += f"  {in_words(last)}"
    return line + (f"  {unreadable} unreadable" if unreadable else "")
