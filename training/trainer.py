"""Pretraining: images in, a run folder out.

RUN/config.json         the resolved configuration
RUN/metrics.jsonl       one line every `log_every` steps and after the last: step, epoch, loss, lr, rate (images/s)
RUN/unreadable.txt      images that could not be read, with the reason
RUN/state.pt            what --resume goes on from
RUN/checkpoints/*.safetensors, RUN/final.safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
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
from training.state import check_config, fingerprint_of, load_state, save_state, trim_metrics


def pretrain(
    config: PretrainConfig, images: Path, run: Path, console: Console | None = None, *, resume: bool = False
) -> Path | None:
    """Train on every image below `images`; returns the final checkpoint, or None when SIGTERM ended the run early.

    The state is saved after each epoch and on SIGTERM. With `resume` a run goes on from there; on a CPU its losses are,
    to the last bit, those of a run that was never interrupted.

    Raises:
        ConfigError: when `run` already holds something, or is to be resumed with another configuration.
        DataError: when there are too few images, others than at the start, or an epoch in which none could be read.
    """
    console = console or Console(stderr=True)
    final = run / "final.safetensors"
    if resume and final.exists():
        console.log(f"{run} is finished already")
        return final
    trainer = Trainer(config, images, run)
    if resume:
        trainer.resume()
    else:
        trainer.create_run()
    console.log(trainer.plan())
    with _progress(console) as progress, _sigterm() as terminated:
        task = progress.add_task("pretrain", total=trainer.steps, rate=0.0, loss=float("nan"))
        for epoch in range(trainer.step // len(trainer.loader), config.epochs):
            for metrics in trainer.train_epoch(epoch, terminated):
                progress.update(task, completed=trainer.step, rate=metrics.rate, loss=metrics.loss)
            whole = trainer.step == (epoch + 1) * len(trainer.loader)
            if whole and (epoch + 1) % config.checkpoint_every == 0 and epoch + 1 < config.epochs:
                trainer.save(run / "checkpoints" / f"epoch-{epoch + 1:04d}.safetensors", epoch + 1)
            trainer.save_state()  # last: killed before it, the epoch is done again, checkpoint and all
            if terminated.is_set():
                console.log(f"stopped after step {trainer.step}; the same command with --resume goes on")
                return None
            console.log(trainer.summary(epoch))
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
        self.mean, self.std = (  # of pixels in [0, 255]; made once, since each is a copy to the device
            torch.tensor(values, device=self.device) * 255
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        self.loader, self.sampler = build_loader(images, config.arch.image_size, config)
        self.model = MixMIM(config.arch).to(self.device).train()
        self.compiled = config.compile and can_compile(self.device)
        self.forward = torch.compile(self.model.pretrain) if self.compiled else self.model.pretrain
        self.optimizer = build_optimizer(self.model, config)
        self.masks = torch.Generator().manual_seed(config.seed)
        self.step, self.steps = 0, config.epochs * len(self.loader)
        self.meter = Meter()
        self.paths: list[Path] = self.loader.dataset.paths  # type: ignore[attr-defined]
        self.images_fingerprint = fingerprint_of(self.paths, images)
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

    def resume(self) -> None:
        """Go on where the run's last saved state ends, or at the start when it was killed before the first.

        Raises:
            ConfigError: when the run was started with another configuration.
            DataError: when the images are not those that it was started with.
            CheckpointError: when the state is damaged.
        """
        check_config(self.run, self.config)
        state = load_state(self.run)
        if state is not None:
            if state["images"] != self.images_fingerprint:
                raise DataError(f"the images in {self.images} are not those that {self.run} was started with.")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.masks.set_state(state["masks"])
            self.step = state["step"]
            self.last = Metrics(**state["last"]) if state["last"] else None
            self.meter = Meter(torch.tensor(state["loss"], device=self.device), state["steps"], state["seen"])
        trim_metrics(self.run / "metrics.jsonl", self.step)
        unreadable = self.run / "unreadable.txt"
        if unreadable.exists():
            self.unreadable = dict.fromkeys(unreadable.read_text().splitlines())

    def save_state(self) -> None:
        """All that `resume` needs."""
        state = {
            "images": self.images_fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self.masks.get_state(),
            "step": self.step,
            "last": dataclasses.asdict(self.last) if self.last else None,
            "loss": float(self.meter.loss),
            "steps": self.meter.steps,
            "seen": self.meter.images,
        }
        save_state(self.run, state)

    def plan(self) -> str:
        """What is about to happen, and why the first step may take long."""
        line = (
            f"{self.config.size} at {self.config.arch.image_size} px on {self.device.type}: {len(self.paths)} images, "
        )
        line += f"{self.config.epochs} epochs of {len(self.loader)} steps"
        if self.compiled:
            return f"{line}; torch.compile takes the first minute or two"
        if self.config.compile:
            return f"{line}; no C++ compiler found, so without torch.compile, which is slower"
        return line

    def train_epoch(self, epoch: int, terminated: threading.Event | None = None) -> Iterator[Metrics]:
        """One pass over the images, or what is left of it; yields the metrics as they are logged.

        Once `terminated` is set, the step in progress is the last.

        Raises:
            DataError: when none of the images could be read.
        """
        done = self.step % len(self.loader)  # of this epoch, when a run is resumed
        self.sampler.epoch, self.sampler.start = epoch, done * self.config.batch_size
        trained = done
        for index, batch in enumerate(self.loader, start=done):
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
            if terminated is not None and terminated.is_set():
                return
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
        return ((pixels_BHWC.float() - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()

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
            "images": len(self.paths),
            "loss": self.last.loss if self.last else None,
            "torch": torch.__version__,
        }
        description = Description(self.config.arch, self.preprocessing, provenance=provenance)
        save_checkpoint(path, self.model.state_dict(), description)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs; on a CPU that is a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return device.type != "cpu" or any(name and shutil.which(name) for name in compilers)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
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
