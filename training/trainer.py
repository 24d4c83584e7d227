"""The training loop of pretraining and fine-tuning: a task and a source of images in, a run folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mixmim_serve.errors import DataError
from mixmim_serve.model.checkpoint import save_checkpoint
from mixmim_serve.signals import stop_signals
from mixmim_serve.sources import Source, fingerprint
from mixmim_serve.version import __version__
from training.augment import step_seed
from training.data import Batch, TrainingImages, build_loader, load_step
from training.distributed import (
    World,
    join_world,
    load_whole_optimizer,
    load_whole_weights,
    synchronized,
    whole_optimizer,
    whole_weights,
    wrap,
)
from training.meter import Meter, Metrics, can_compile, in_words, progress_bar
from training.nonfinite import BadStep, save_nonfinite
from training.optim import build_optimizer, learning_rate
from training.resources import explain_shortage
from training.run_folder import RunFolder
from training.task import Task
from training.trackers import Tracker, check_trackers, open_trackers


def train(
    task: Task,
    source: Source,
    run: Path,
    console: Console | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trackers: Sequence[str] = (),
) -> Path | None:
    """Train on the images of `source`; returns the final checkpoint, or None when SIGTERM or Ctrl-C ended it early.

    A checkpoint is saved after each epoch and on both. With `resume` a run goes on from the last one; on a CPU its
    losses are, to the last bit, those of a run that was never interrupted: all that is random (order, crops, masks,
    dropped paths) is a function of seed, epoch or step, image and rank, so no random state need be saved.

    Raises:
        ConfigError: when `run` holds something, is in use, or is to be resumed with another configuration.
        DataError: when there are too few images, others than at the start, or too many that cannot be read.
        CheckpointError: when a checkpoint is damaged or could not be written.
        NonFiniteError: when a loss or gradient is not finite; what led to it was saved.
        ResourceError: when there is too little memory.
    """
    check_trackers(trackers)
    with join_world() as world:
        console = (console or Console(stderr=True, log_path=False)) if world.main else Console(quiet=True)
        folder = RunFolder(run)
        if resume and folder.final.exists():
            console.log(f"{run} is finished already")
            return folder.final
        trainer = Trainer(task, source, folder, world)
        with folder.lock() if world.main else contextlib.nullcontext(), explain_shortage(task.config, world.size):
            if world.main and resume:
                folder.check(task.config, trainer.about())
            elif world.main:
                folder.create(task.config, trainer.about(), overwrite)
            world.wait()
            if resume:
                trainer.resume()
            return trainer.fit(console, trackers)


class Trainer:
    """One run's model, data and optimiser."""

    def __init__(self, task: Task, source: Source, folder: RunFolder, world: World) -> None:
        self.task, self.config, self.source, self.folder, self.world = task, task.config, source, folder, world
        torch.manual_seed(self.config.seed)
        task.to(world.device)
        self.model = task.objective.model
        self.dataset = TrainingImages(source, self.model.arch.image_size, self.config, task.classes)
        self.loader, self.sampler = build_loader(self.dataset, self.config, world.rank, world.size)
        self.module = wrap(task.objective.train(), world, self.config)
        self.compiled = self.config.compile and can_compile(world.device)
        self.forward: Any = torch.compile(self.module) if self.compiled else self.module
        self.optimizer = build_optimizer(task.parameter_groups(), self.config)
        # Set by the first gradient that is not finite, and never reset: fused AdamW then leaves the weights alone.
        self.optimizer.found_inf = torch.zeros((), device=world.device)  # type: ignore[attr-defined]
        self.images = fingerprint(source)
        self.step, self.steps = 0, self.config.epochs * self.sampler.steps
        self.meter = Meter()
        self.last: Metrics | None = None
        self.trackers: list[Tracker] = []
        self.changed = ""  # of the configuration, since the run was started

    def about(self) -> dict[str, Any]:
        """What config.json holds besides the configuration."""
        about = {
            "task": self.task.name,
            "start": self.task.start,
            "images": {"source": self.source.name, "count": len(self.source.keys), "fingerprint": self.images},
            "processes": self.world.size,
            "command": sys.argv,
            "versions": {"mixmim-serve": __version__, "torch": torch.__version__},
        }
        return about | ({"changes": self.folder.changes} if self.folder.changes else {})

    def resume(self) -> None:
        """Go on from the run's last checkpoint, or at the start when it was killed before the first.

        Raises:
            DataError: when the images are not those that the run was started with.
            CheckpointError: when the checkpoint is damaged.
        """
        saved = self.folder.load()
        if saved is not None:
            weights, state = saved
            if state["images"] != self.images:
                raise DataError(
                    f"the images in {self.source.name} are not those that {self.folder.path} was started with."
                )
            load_whole_weights(self.model, weights)
            load_whole_optimizer(self.model, self.optimizer, state["optimizer"])
            self.step = state["step"]
            self.last = Metrics(**state["last"]) if state["last"] else None
            self.meter = Meter.from_state(state["meter"], self.world.device)
        if self.world.main:
            self.folder.rewind(self.step)
            self.changed = self.folder.change(self.step)
            if self.changed:
                self.folder.describe(self.config, self.about())
        self.world.wait()

    def fit(self, console: Console, trackers: Sequence[str]) -> Path | None:
        """All epochs that are left."""
        console.log(self.plan())
        if self.world.main:
            self.trackers = open_trackers(trackers, self.folder.path, self.about(), self.step)
        stop = stop_signals(signal.SIGTERM, signal.SIGINT)
        with progress_bar(console) as progress, stop as stopping, contextlib.ExitStack() as closing:
            for tracker in self.trackers:
                closing.callback(tracker.close)
            task = progress.add_task(self.task.name, total=self.steps, completed=self.step, text="")
            for epoch in range(self.step // self.sampler.steps, self.config.epochs):
                for metrics in self.train_epoch(epoch, stopping):
                    progress.update(task, completed=self.step, text=in_words(metrics))
                if self.step == (epoch + 1) * self.sampler.steps:
                    self.judge(epoch + 1, console)
                self.save_checkpoint()  # last: killed before it, the epoch is done again, judgement and all
                if self.world.any(stopping.is_set()) and self.step < self.steps:
                    console.log(f"stopped after step {self.step}; the same command with --resume goes on")
                    return None
                console.log(self.summary(epoch))
        weights = whole_weights(self.model)
        if self.world.main:
            save_checkpoint(self.folder.final, weights, self.task.describe(self.provenance()))
        self.world.wait()
        return self.folder.final

    def train_epoch(self, epoch: int, stopping: threading.Event | None = None) -> Iterator[Metrics]:
        """One pass over the images, or what is left of it; yields the metrics as they are logged.

        Once `stopping` is set, the step in progress is the last (with several processes: the next logged one).
        """
        self.sampler.epoch, self.sampler.start = epoch, self.step % self.sampler.steps
        parts = iter(self.loader)
        for index in range(self.sampler.start, self.sampler.steps):
            self.set_learning_rate(epoch + index / self.sampler.steps)
            loss, norm = self.train_step(self.next_batch(parts) for _ in range(self.config.accumulate))
            self.step += 1
            self.meter.add(loss, norm, self.config.batch_size // self.world.size)
            logged = self.step % self.config.log_every == 0 or self.step == self.steps
            if logged:
                yield self.log()
            if self.config.save_steps and self.step % self.config.save_steps == 0 and index + 1 < self.sampler.steps:
                self.save_checkpoint()
            if stopping and (self.world.size == 1 or logged) and self.world.any(stopping.is_set()):
                return

    def next_batch(self, parts: Iterator[Batch]) -> Batch:
        """The next part, timed.

        Raises:
            DataError: when more images than the allowed share could not be read.
        """
        began = time.perf_counter()
        batch = next(parts)
        self.meter.waited += time.perf_counter() - began
        self.folder.note_unreadable(batch.unreadable)
        images, unreadable = len(self.source.keys), len(self.folder.unreadable)
        if unreadable > self.config.max_unreadable * images / self.world.size or not len(batch.pixels_BHWC):
            raise DataError(
                f"{unreadable} of the {images} images in {self.source.name} could not be read, more than "
                f"max_unreadable={self.config.max_unreadable:g} allows: see {self.folder.path / 'unreadable.txt'}."
            )
        return batch

    def train_step(self, parts: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Forward, backward, update; returns loss and gradient norm without waiting for them."""
        mask_seed = step_seed(self.config.seed, self.step, self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        for part, batch in enumerate(parts):
            seed = step_seed(self.config.seed, self.step, self.world.rank, part)
            inputs = self.task.inputs(batch, mask_seed, seed)
            torch.manual_seed(seed)  # of dropped paths
            with synchronized(self.module, last=part == self.config.accumulate - 1):
                loss += self.backward(inputs)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        found: Tensor = self.optimizer.found_inf  # type: ignore[attr-defined]
        found.logical_or_(~norm.isfinite())
        self.optimizer.step()
        return loss, norm

    def backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Add a part's gradients; returns its share of the loss."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss: Tensor = self.forward(*inputs) / self.config.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def set_learning_rate(self, epoch: float) -> None:
        """The schedule's value for a fractional epoch."""
        lr = learning_rate(epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def log(self) -> Metrics:
        """A line of the log.

        Raises:
            NonFiniteError: when a gradient since the last line was not finite.
        """
        self.check_finite()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.last = self.meter.read(self.step, self.step / self.sampler.steps, lr, self.world)
        self.record(dataclasses.asdict(self.last))
        self.meter = Meter()
        return self.last

    def check_finite(self) -> None:
        """Stop the run if a gradient since the last line of the log was not finite; waits for the device.

        Raises:
            NonFiniteError: after saving what led to it.
        """
        if (ago := self.meter.nonfinite()) is None:
            return
        step = self.step - ago
        bad = BadStep(step, self.config.seed, *load_step(self.dataset, self.sampler, step))
        weights, description = whole_weights(self.model), self.task.describe(self.provenance())
        raise save_nonfinite(self.folder.path, self.world, weights, description, bad)

    def judge(self, epochs: int, console: Console) -> None:
        """Measurements and pictures of an epoch."""
        self.task.objective.eval()
        judged = self.task.judge(epochs, self.world)
        pictures = self.task.pictures(epochs)
        self.task.objective.train()
        if judged:
            self.record({"step": self.step, "epoch": epochs, **judged})
            console.log(", ".join(f"{name} {value:.2f}" for name, value in judged.items()))
        for name, picture in pictures.items() if self.world.main else ():
            self.folder.save_picture(name, epochs, picture)
            for tracker in self.trackers:
                tracker.picture(self.step, name, np.asarray(picture))

    def record(self, values: Mapping[str, Any]) -> None:
        """To metrics.jsonl and the trackers, from the first process."""
        if self.world.main:
            self.folder.append(values)
        for tracker in self.trackers:
            tracker.log(self.step, {name: value for name, value in values.items() if name != "step"})

    def save_checkpoint(self) -> None:
        """Weights, and all else that `resume` needs; all processes must ask.

        Raises:
            CheckpointError: when it could not be written; the ones before stay.
            NonFiniteError: when a gradient since the last line of the log was not finite: no run could go on from here.
        """
        self.check_finite()
        weights, optimizer = whole_weights(self.model), whole_optimizer(self.model, self.optimizer)
        if self.world.main:
            self.folder.save(self.step, weights, self.task.describe(self.provenance()), self.state(optimizer))
            self.folder.prune(self.config, self.sampler.steps)
        self.world.wait()

    def state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """All but the weights."""
        return {
            "images": self.images,
            "optimizer": optimizer,
            "step": self.step,
            "last": dataclasses.asdict(self.last) if self.last else None,
            "meter": self.meter.state(),
        }

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from."""
        epochs = self.step / self.sampler.steps
        return self.about() | {
            "epochs": int(epochs) if epochs.is_integer() else epochs,
            "loss": self.last and self.last.loss,
        }

    def plan(self) -> str:
        """What is about to happen, and why the first step may take long."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        processes = f"{self.world.size} x " if self.world.size > 1 else ""
        line = (
            f"{self.task.name}: {parameters / 1e6:.1f} M parameters at {self.model.arch.image_size} px on "
            f"{processes}{self.world.device.type}; {len(self.source.keys)} images, {self.config.epochs} epochs of "
            f"{self.sampler.steps} steps"
        )
        if self.step:
            line += f", resumed after step {self.step}"
        if self.changed:
            line += f" with {self.changed}"
        if self.compiled:
            return f"{line}; torch.compile takes the first minute or two"
        if self.config.compile:
            return f"{line}; no C++ compiler found, so without torch.compile, which is slower"
        return line

    def summary(self, epoch: int) -> str:
        """One line an epoch, for terminals and log files."""
        line = f"epoch {epoch + 1}/{self.config.epochs}"
        if self.last:
            line += f"  {in_words(self.last)}"
        return line + (f"  {len(self.folder.unreadable)} unreadable" if self.folder.unreadable else "")
