"""Pretraining: images in, a run folder out.

RUN/config.json         the resolved configuration
RUN/metrics.jsonl       one line every `log_every` steps and after the last: step, epoch, loss, lr, rate (images/s)
RUN/unreadable.txt      images that could not be read, with the reason
RUN/checkpoints/*.safetensors, RUN/final.safetensors
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mixmim_serve.config import Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.files import atomic_path
from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.model.mixmim import random_units
from mixmim_serve.version import __version__
from training.config import PretrainConfig
from training.data import Batch, build_loader
from training.optim import build_optimizer, learning_rate


def pretrain(config: PretrainConfig, images: Path, run: Path, console: Console | None = None) -> Path:
    """Train on every image below `images`; returns the final checkpoint.

    Raises:
        ConfigError: when `run` already holds something.
        DataError: when there are too few images, or an epoch in which none could be read.
    """
    console = console or Console(stderr=True)
    trainer = Trainer(config, images, run)
    trainer.create_run()
    console.log(trainer.plan())
    with _progress(console) as progress:
        task = progress.add_task("pretrain", total=trainer.steps, rate=0.0, loss=float("nan"))
        for epoch in range(config.epochs):
            for metrics in trainer.train_epoch(epoch):
                progress.update(task, completed=trainer.step, rate=metrics.rate, loss=metrics.loss)
            if (epoch + 1) % config.checkpoint_every == 0 and epoch + 1 < config.epochs:
                trainer.save(run / "checkpoints" / f"epoch-{epoch + 1:04d}.safetensors", epoch + 1)
            console.log(trainer.summary(epoch))
    final = run / "final.safetensors"
    trainer.save(final, config.epochs)
    return final


@dataclass(frozen=True)
class Metrics:
    """Means since the last line of the log."""

    step: int
    epoch: float
    loss: float
    lr: float
    rate: float  # images/s


@dataclass
class Meter:
    """Sums between two log lines; the loss stays on its device until it is read."""

    loss: Tensor | float = 0.0
    steps: int = 0
    images: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, images: int) -> None:
        """One step."""
        self.loss += loss
        self.steps += 1
        self.images += images

    def read(self, step: int, epoch: float, lr: float) -> Metrics:
        """The means; waits for the device."""
        loss = float(self.loss) / self.steps
        return Metrics(
            step, round(epoch, 4), round(loss, 6), lr, round(self.images / (time.perf_counter() - self.since), 1)
        )


class Trainer:
    """One run's model, data and optimiser."""

    def __init__(self, config: PretrainConfig, images: Path, run: Path) -> None:
        self.config, self.images, self.run = config, images, run
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        self.preprocessing = Preprocessing.evaluation(config.arch.image_size)
        self.loader, self.sampler = build_loader(images, config.arch.image_size, config)
        self.model = MixMIM(config.arch).to(self.device).train()
        self.compiled = config.compile and can_compile(self.device)
        self.forward = torch.compile(self.model.pretrain) if self.compiled else self.model.pretrain
        self.optimizer = build_optimizer(self.model, config)
        self.masks = torch.Generator().manual_seed(config.seed)
        self.step, self.steps = 0, config.epochs * len(self.loader)
        self.meter = Meter()
        self.unreadable: dict[str, None] = {}  # ordered and without doubles
        self.last: Metrics | None = None

    def create_run(self) -> None:
        """The run folder with its configuration.

        Raises:
            ConfigError: when the folder is not empty.
        """
        if self.run.exists() and any(self.run.iterdir()):
            raise ConfigError(f"{self.run} is not empty: choose another folder for --out, nothing was overwritten.")
        (self.run / "checkpoints").mkdir(parents=True)
        with atomic_path(self.run / "config.json") as path:
            path.write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    def plan(self) -> str:
        """What is about to happen, and why the first step may take long."""
        images = len(self.loader.dataset)  # type: ignore[arg-type]
        line = f"{self.config.size} at {self.config.arch.image_size} px on {self.device.type}: {images} images, "
        line += f"{self.config.epochs} epochs of {len(self.loader)} steps"
        if self.compiled:
            return f"{line}; torch.compile takes the first minute or two"
        if self.config.compile:
            return f"{line}; no C++ compiler found, so without torch.compile, which is slower"
        return line

    def train_epoch(self, epoch: int) -> Iterator[Metrics]:
        """One pass over the images; yields the metrics as they are logged.

        Raises:
            DataError: when none of the images could be read.
        """
        self.sampler.epoch = epoch
        trained = 0
        for index, batch in enumerate(self.loader):
            self.note_unreadable(batch)
            if len(batch.pixels_BHWC) >= 2:
                self.set_learning_rate(epoch + index / len(self.loader))
                self.meter.add(self.train_step(batch), len(batch.pixels_BHWC))
                trained += 1
            self.step += 1
            if (self.step % self.config.log_every == 0 or self.step == self.steps) and self.meter.steps:
                lr = self.optimizer.param_groups[0]["lr"]
                self.last = self.meter.read(self.step, self.step / len(self.loader), lr)
                self.log(self.last)
                self.meter = Meter()
                yield self.last
        if not trained:
            raise DataError(f"none of the images in {self.images} could be read: see {self.run / 'unreadable.txt'}.")

    def train_step(self, batch: Batch) -> Tensor:
        """Forward, backward, update; returns the loss without waiting for it."""
        pixels_BCHW = self.normalize(batch.pixels_BHWC.to(self.device, non_blocking=True))
        mask = random_units(self.config.arch.units, self.config.mask_ratio, self.masks).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss = self.forward(pixels_BCHW, mask).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def normalize(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 to normalised float32 (B, 3, H, W), on the device."""
        mean, std = (
            torch.tensor(values, device=self.device) * 255
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return ((pixels_BHWC.float() - mean) / std).permute(0, 3, 1, 2).contiguous()

    def set_learning_rate(self, epoch: float) -> None:
        """The schedule's value for a fractional epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, self.config)

    def note_unreadable(self, batch: Batch) -> None:
        """Keep each unreadable image once, in the run folder too."""
        new = [reason for reason in batch.unreadable if reason not in self.unreadable]
        self.unreadable.update(dict.fromkeys(new))
        if new:
            with (self.run / "unreadable.txt").open("a") as file:
                file.writelines(f"{reason}\n" for reason in new)

    def log(self, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl."""
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def summary(self, epoch: int) -> str:
        """One line an epoch, for terminals and log files."""
        line = f"epoch {epoch + 1}/{self.config.epochs}"
        if self.last:
            line += f"  loss {self.last.loss:.4f}  {self.last.rate:.0f} images/s"
        return line + (f"  {len(self.unreadable)} unreadable" if self.unreadable else "")

    def save(self, path: Path, epochs: int) -> None:
        """The weights so far, with their provenance."""
        provenance: dict[str, Any] = {
            "made_by": f"mixmim-serve {__version__}",
            "recipe": dataclasses.asdict(self.config),
            "epochs": epochs,
            "images": len(self.loader.dataset),  # type: ignore[arg-type]
            "loss": self.last.loss if self.last else None,
            "torch": torch.__version__,
        }
        description = Description(self.config.arch, self.preprocessing, provenance=provenance)
        save_checkpoint(path, self.model.state_dict(), description)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs; on a CPU that is a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return device.type != "cpu" or any(name and shutil.which(name) for name in compilers)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
