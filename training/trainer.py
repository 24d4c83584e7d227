"""The training loop of pretraining and fine-tuning: a task and a source of images in, a run folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
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
from mixmim_serve.signals import stop_signals
from mixmim_serve.sources import Source, fingerprint
from training import about
from training.augment import step_seed
from training.compiling import NO_COMPILER, CompilationStoppedError, Compiler, Decision
from training.config import AUTO
from training.data import Batch, TrainingImages, build_loader, load_step
from training.distributed import (
    World,
    gather_optimizer,
    gather_weights,
    join_world,
    load_optimizer,
    load_weights,
    synchronized,
    wrap,
)
from training.meter import Meter, Metrics, announcer, in_words, left_in_words, progress_bar
from training.nonfinite import BadStep, save_nonfinite
from training.optim import build_optimizer, learning_rate
from training.report import refresh
from training.resources import explain_shortage
from training.run_folder import RunFolder
from training.task import Task, evaluation
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
    """Train on the images of `source`; returns the final checkpoint, or None after SIGTERM or Ctrl-C.

    A checkpoint is saved after each epoch and on both signals. With `resume` a run continues from the last one. On a
    CPU its losses are bit-equal to those of an uninterrupted run: everything random (order, crops, masks, dropped
    paths) is a function of seed, epoch or step, image and rank, so no random state is saved.

    Raises:
        ConfigError: when `run` is not empty, is in use, or is resumed with another configuration.
        DataError: when there are too few images, other images than at the start, or too many unreadable ones.
        CheckpointError: when a checkpoint is damaged or cannot be written.
        NonFiniteError: when a loss or gradient is not finite; the step was saved for `mixmim replay`.
        ResourceError: when memory or shared memory runs out.
    """
    check_trackers(trackers)
    with join_world() as world:
        console = (console or Console(stderr=True, log_path=False)) if world.main else Console(quiet=True)
        folder = RunFolder(run)
        if resume and folder.final.exists():
            console.log(f"{run} is already finished")
            return folder.final
        trainer = Trainer(task, source, folder, world)
        with folder.lock() if world.main else contextlib.nullcontext(), explain_shortage(task.config, world.size):
            if world.main and resume:
                folder.check(task.config, trainer.metadata())
            elif world.main:
                folder.create(task.config, trainer.metadata(), overwrite)
            world.wait()
            if resume:
                trainer.resume()
            return trainer.fit(console, trackers)


class Trainer:
    """One run: its model, data, optimiser and position."""

    def __init__(self, task: Task, source: Source, folder: RunFolder, world: World) -> None:
        self.task, self.config, self.source, self.folder, self.world = task, task.config, source, folder, world
        torch.manual_seed(self.config.seed)
        task.to(world.device)
        self.model = task.objective.model
        size, crops = task.objective.crop_size, task.objective.crops
        self.dataset = TrainingImages(source, size, self.config, task.classes, crops)
        self.loader, self.sampler = build_loader(self.dataset, self.config, world.rank, world.size)
        self.module = wrap(task.objective.train(), world, self.config)
        self.compiler = Compiler(self.module, self.config.compile, world)
        self.optimizer = build_optimizer(task.parameter_groups(), self.config)
        # Set by the first non-finite gradient and never reset: fused AdamW then leaves the weights unchanged.
        self.optimizer.found_inf = torch.zeros((), device=world.device)  # type: ignore[attr-defined]
        self.images = fingerprint(source)
        self.step, self.steps = 0, self.config.epochs * self.sampler.steps
        self.meter = Meter()
        self.last: Metrics | None = None
        self.trackers: list[Tracker] = []
        self.changed = ""  # in words: configuration changes on resume

    def metadata(self) -> dict[str, Any]:
        """The content of config.json besides the configuration."""
        metadata = about.metadata(self.task, self.source, self.images, self.world) | self.compiler.about()
        return metadata | ({"changes": self.folder.changes} if self.folder.changes else {})

    def resume(self) -> None:
        """Continue from the run's last checkpoint, or from the start when it was killed before the first one.

        Raises:
            DataError: when the images differ from those at the start of the run.
            CheckpointError: when the checkpoint is damaged.
        """
        if self.config.compile == AUTO:
            self.compiler.decision = Decision.of_run(self.folder.about())
        saved = self.folder.load()
        if saved is not None:
            weights, state = saved
            if state["images"] != self.images:
                raise DataError(f"{self.folder.path} was started with other images than those in {self.source.name}.")
            load_weights(self.model, weights)
            load_optimizer(self.model, self.optimizer, state["optimizer"])
            self.step = state["step"]
            self.last = Metrics(**state["last"]) if state["last"] else None
            self.meter = Meter.from_state(state["meter"], self.world.device)
            self.task.objective.load_resume_state(state.get("objective", {}))
            self.compiler.seconds = state.get("seconds", [])
        if self.world.main:
            self.folder.rewind(self.step)
            self.changed = self.folder.record_changes(self.step)
            if self.changed:
                self.folder.write_config(self.config, self.metadata())
        self.world.wait()

    def fit(self, console: Console, trackers: Sequence[str]) -> Path | None:
        """Train the remaining epochs; returns the final checkpoint, or None when stopped by a signal."""
        console.log(self.plan())
        if self.world.main:
            self.trackers = open_trackers(trackers, self.folder.path, self.metadata(), self.step)
        stop = stop_signals(signal.SIGTERM, signal.SIGINT)
        with progress_bar(console) as progress, stop as stopping, contextlib.ExitStack() as closing:
            for tracker in self.trackers:
                closing.callback(tracker.close)
            bar = progress.add_task(self.task.name, total=self.steps, completed=self.step, text="", left="")
            self.compiler.stop, self.compiler.say = stopping, announcer(progress, bar, console)
            try:
                for metrics in self.epochs(stopping, console):
                    left = left_in_words((self.steps - self.step) * self.config.batch_size, metrics.rate)
                    progress.update(bar, completed=self.step, text=in_words(metrics), left=left)
            except CompilationStoppedError:
                console.log("stopped while compiling; the same command and --resume continue from the last checkpoint")
                return None
            if self.step < self.steps:
                console.log(f"stopped after step {self.step}; continue with the same command and --resume")
                return None
        if self.world.main:
            self.folder.prune(self.config, self.sampler.steps)  # what a kill during the last checkpoint has left
            self.folder.finish(self.task.objective.final_weights(), self.task.describe(self.provenance()))
            console.log(self.folder.in_words())
        self.world.wait()
        return self.folder.final

    def epochs(self, stopping: threading.Event, console: Console) -> Iterator[Metrics]:
        """The remaining epochs, each with its evaluation and checkpoint, until `stopping` is set; yields as logged."""
        if not self.step:
            self.evaluate(0, console)
        for epoch in range(self.step // self.sampler.steps, self.config.epochs):
            yield from self.train_epoch(epoch, stopping)
            if self.step == (epoch + 1) * self.sampler.steps:
                self.evaluate(epoch + 1, console)
            self.save_checkpoint()  # after the evaluation: a run killed before this repeats both
            if self.world.any(stopping.is_set()) and self.step < self.steps:
                return
            console.log(about.summary(epoch, self.config.epochs, self.last, len(self.folder.unreadable)))

    def train_epoch(self, epoch: int, stopping: threading.Event | None = None) -> Iterator[Metrics]:
        """The rest of one pass over the images; yields the metrics as they are logged.

        Once `stopping` is set, it ends after the step in progress (with several processes: after the next logged one).
        """
        self.sampler.epoch, self.sampler.start = epoch, self.step % self.sampler.steps
        batches = iter(self.loader)
        for index in range(self.sampler.start, self.sampler.steps):
            self.set_learning_rate(epoch + index / self.sampler.steps)
            self.decide_compilation()
            with self.compiler.step(self.step, self.meter):
                loss, norm = self.train_step(self.next_batch(batches) for _ in range(self.config.accumulate))
                self.meter.add(loss, norm, self.config.batch_size // self.world.size)
            self.step += 1
            logged = self.step % self.config.log_every == 0 or self.step == self.steps
            if logged:
                yield self.log()
            if self.config.save_steps and self.step % self.config.save_steps == 0 and index + 1 < self.sampler.steps:
                self.save_checkpoint()
            if stopping and (self.world.size == 1 or logged) and self.world.any(stopping.is_set()):
                return

    def decide_compilation(self) -> None:
        """Decide once whether the network is compiled from this step on, and record it before that happens."""
        decision = self.compiler.decide(self.step, self.steps)
        if decision and self.world.main:
            self.folder.write_config(self.config, self.metadata())
            if decision.from_step is None:
                self.compiler.say(f"not compiling: {decision.why}", True)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next part of a batch; the time it took counts as waiting.

        Raises:
            DataError: when the share of unreadable images exceeds `max_unreadable`.
        """
        start = time.perf_counter()
        batch = next(batches)
        self.meter.waited += time.perf_counter() - start
        self.folder.note_unreadable(batch.unreadable)
        images, unreadable = len(self.source.keys), len(self.folder.unreadable)
        if unreadable > self.config.max_unreadable * images / self.world.size or not len(batch.pixels_BHWC):
            raise DataError(
                f"{unreadable} of the {images} images in {self.source.name} could not be read, more than "
                f"max_unreadable={self.config.max_unreadable:g} allows: see {self.folder.path / 'unreadable.txt'}."
            )
        return batch

    def train_step(self, parts: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Forward, backward, update; returns loss and gradient norm without waiting for the device."""
        mask_seed = step_seed(self.config.seed, self.step, self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        for part, batch in enumerate(parts):
            seed = step_seed(self.config.seed, self.step, self.world.rank, part)
            inputs = self.task.inputs(batch, mask_seed, seed)
            torch.manual_seed(seed)  # for dropped paths
            with synchronized(self.module, last=part == self.config.accumulate - 1):
                loss += self.backward(inputs)
        parameters = self.task.objective.parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        found_inf: Tensor = self.optimizer.found_inf  # type: ignore[attr-defined]
        found_inf.logical_or_(~norm.isfinite())
        self.optimizer.step()
        self.task.objective.after_step(self.step / self.steps)
        return loss, norm

    def backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Accumulate a part's gradients; returns its share of the loss."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss: Tensor = self.compiler.forward(*inputs) / self.config.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def set_learning_rate(self, epoch: float) -> None:
        """Set the learning rate of a fractional epoch."""
        lr = learning_rate(epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def log(self) -> Metrics:
        """Write a log line.

        Raises:
            NonFiniteError: when a gradient since the last line was not finite.
        """
        self.check_finite()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.last = self.meter.read(self.step, self.step / self.sampler.steps, lr, self.world)
        self.record(dataclasses.asdict(self.last) | self.task.objective.readings(self.world))
        self.meter = Meter()
        return self.last

    def check_finite(self) -> None:
        """Stop the run if a gradient since the last log line was not finite; waits for the device.

        Raises:
            NonFiniteError: after saving the step for `mixmim replay`.
        """
        if (ago := self.meter.nonfinite()) is None:
            return
        bad = BadStep(self.step - ago, self.config.seed, *load_step(self.dataset, self.sampler, self.step - ago))
        saved = gather_weights(self.model), self.task.describe(self.provenance()), bad
        raise save_nonfinite(self.folder.path, self.world, *saved, self.task.objective.resume_state())

    def evaluate(self, epochs: int, console: Console) -> None:
        """Log the metrics and write the pictures that are due after `epochs` epochs, then the report."""
        with self.meter.uncounted(), evaluation(self.task.objective, self.world.device):
            metrics, pictures = self.task.evaluate(epochs, self.world), self.task.pictures(epochs)
        if metrics:
            self.record({"step": self.step, "epoch": epochs, **metrics})
            console.log(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
        for name, picture in pictures.items() if self.world.main else ():
            self.folder.save_picture(name, epochs, picture)
            for tracker in self.trackers:
                tracker.picture(self.step, name, np.asarray(picture))
        if self.world.main and self.config.report:
            refresh(self.folder.path, console.log)

    def record(self, values: Mapping[str, Any]) -> None:
        """Write values to metrics.jsonl and the trackers, from the first process only."""
        if self.world.main:
            self.folder.append(values)
        for tracker in self.trackers:
            tracker.log(self.step, {name: value for name, value in values.items() if name != "step"})

    def save_checkpoint(self) -> None:
        """Save the weights and everything else that `resume` needs; every process must call this.

        Raises:
            CheckpointError: when it cannot be written; earlier ones are kept.
            NonFiniteError: when a gradient since the last log line was not finite: no run could resume from here.
        """
        self.check_finite()
        weights, optimizer = gather_weights(self.model), gather_optimizer(self.model, self.optimizer)
        if self.world.main:
            self.folder.save(self.step, weights, self.task.describe(self.provenance()), self.state(optimizer))
            self.folder.prune(self.config, self.sampler.steps)
        self.world.wait()

    def state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """What `resume` needs besides the weights."""
        return {
            "images": self.images,
            "optimizer": optimizer,
            "step": self.step,
            "last": dataclasses.asdict(self.last) if self.last else None,
            "meter": self.meter.state(),
            "objective": self.task.objective.resume_state(),
            "seconds": self.compiler.seconds,
        }

    def provenance(self) -> dict[str, Any]:
        """The run's metadata, epochs and loss, to store with its weights."""
        epochs = self.step / self.sampler.steps
        return self.metadata() | {
            "epochs": int(epochs) if epochs.is_integer() else epochs,
            "loss": self.last and self.last.loss,
        }

    def plan(self) -> str:
        """One line about the run ahead, and whether its first step compiles."""
        line = about.plan(self.task, len(self.source.keys), self.sampler.steps, self.world, self.step, self.changed)
        return line if self.config.compile is not True or self.compiler.possible else f"{line}; {NO_COMPILER}"
