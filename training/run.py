"""A run's folder. Only the first process writes to it, but for the names of unreadable images and bad batches.

RUN/config.json          the resolved configuration, data and command
RUN/metrics.jsonl        one line every `log_every` steps, and one for each judgement
RUN/events.out.tfevents* the same for TensorBoard
RUN/unreadable.txt       images that could not be read, with the reason
RUN/checkpoints/         step-N.safetensors (weights) and step-N.state.pt (all else that --resume needs)
RUN/samples/             pictures of reconstructions
RUN/nonfinite/           what led to a loss that is not finite (replay.py)
RUN/final.safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError, InUseError
from mixmim_serve.files import atomic_path
from mixmim_serve.locks import LOCK, lock_folder
from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint
from training.config import RunConfig

MAY_CHANGE = {"workers", "max_unreadable", "save_steps", "keep_last", "keep_every"}  # without changing a number
MAY_HELP = {"base_lr", "bf16", "compile"}  # a run that cannot go on as it was; written down when they are changed


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.final = path / "final.safetensors"
        self.checkpoints = path / "checkpoints"
        self.unreadable: dict[str, None] = {}  # ordered and without doubles
        self.changing: dict[str, list[Any]] = {}  # of MAY_HELP: name: [before, now]
        self.changes: list[dict[str, Any]] = []  # {"step": step, name: [before, now]}

    def create(self, config: RunConfig, about: Mapping[str, Any], overwrite: bool = False) -> None:
        """An empty run with its configuration.

        Raises:
            ConfigError: when the folder holds something and is not to be overwritten, or holds what is no run.
        """
        if self.path.exists() and any(each.name != LOCK for each in self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"{self.path} is not empty: choose another folder for --out, go on with --resume, or replace the "
                    "run with --overwrite; nothing was changed."
                )
            if not (self.path / "config.json").is_file():
                raise ConfigError(
                    f"{self.path} holds other files than a run (no config.json): nothing was overwritten."
                )
            for each in self.path.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
                elif each.name != LOCK:
                    each.unlink()
        self.checkpoints.mkdir(parents=True)
        self.describe(config, about)

    def describe(self, config: RunConfig, about: Mapping[str, Any]) -> None:
        """Write config.json."""
        with atomic_path(self.path / "config.json") as path:
            path.write_text(as_json(config, about) + "\n")

    def check(self, config: RunConfig, about: Mapping[str, Any]) -> None:
        """Compare with what the run was started with, before it is resumed; for what may differ, see `change`.

        Raises:
            ConfigError: when there is no run, or naming what differs.
        """
        path = self.path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{self.path} holds no run to resume (no config.json): start it without --resume.")
        saved = json.loads(path.read_text())
        before, now = (
            values.get("config", {}) | {"task": values.get("task"), "start": values.get("start")}
            for values in (saved, json.loads(as_json(config, about)))
        )
        differing = {
            name: [before.get(name), value]
            for name, value in now.items()
            if name not in MAY_CHANGE and before.get(name) != value
        }
        if not differing.keys() <= MAY_HELP:
            listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in differing.items())
            raise ConfigError(f"{self.path} was started with {listed}: resume it with the options of its start.")
        self.changes = saved.get("changes", [])
        self.changing = differing

    def change(self, step: int) -> str:
        """Add what `check` found to `changes`, as of `step`; returns it in words."""
        if self.changing:
            self.changes.append({"step": step, **self.changing})
        return ", ".join(f"{name} {new} (was {old})" for name, (old, new) in self.changing.items())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process, until it ends in whatever way.

        Raises:
            ConfigError: when another process holds it.
        """
        try:
            lock = lock_folder(self.path)
        except InUseError as error:
            raise ConfigError(f"{self.path} is in use by another run: wait for it, or choose another --out.") from error
        try:
            yield
        finally:
            lock.release()

    def append(self, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def note_unreadable(self, reasons: tuple[str, ...]) -> None:
        """Keep each unreadable image once."""
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self.unreadable]
        self.unreadable.update(dict.fromkeys(new))
        if new:
            with (self.path / "unreadable.txt").open("a") as file:
                file.writelines(f"{reason}\n" for reason in new)

    def save(self, step: int, weights: Mapping[str, Tensor], description: Description, state: dict[str, Any]) -> None:
        """A checkpoint: it counts once its state, written last, is whole.

        Raises:
            CheckpointError: when it could not be written; the ones before stay.
        """
        stem = self.checkpoints / f"step-{step:08d}"
        with writing(stem):
            save_checkpoint(stem.with_suffix(".safetensors"), weights, description)
            with atomic_path(stem.with_suffix(".state.pt")) as temporary:
                torch.save(state, temporary)

    def prune(self, config: RunConfig, epoch: int) -> None:
        """Delete checkpoints but for the last few and those of every so many whole epochs, `epoch` steps each."""
        for step in self.steps()[: -config.keep_last]:
            if step % (config.keep_every * epoch):
                stem = self.checkpoints / f"step-{step:08d}"
                stem.with_suffix(".state.pt").unlink()
                stem.with_suffix(".safetensors").unlink()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(int(path.name[5:13]) for path in self.checkpoints.glob("step-????????.state.pt"))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights and state of the last checkpoint, or None where none was saved yet.

        Raises:
            CheckpointError: when it is damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        stem = self.checkpoints / f"step-{steps[-1]:08d}"
        try:
            state: dict[str, Any] = torch.load(stem.with_suffix(".state.pt"), map_location="cpu", weights_only=True)
            return read_checkpoint(stem.with_suffix(".safetensors"))[1], state
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointError) as error:
            advice = "delete its two files to go on from the one before" if len(steps) > 1 else "start the run anew"
            raise CheckpointError(f"the checkpoint {stem} is damaged: {advice}.") from error

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, and a line that was cut while it was written: it will come again."""
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
            except ValueError:
                break
        if path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text("".join(kept))
        unreadable = self.path / "unreadable.txt"
        if unreadable.exists():
            self.unreadable = dict.fromkeys(unreadable.read_text().splitlines())


def as_json(config: RunConfig, about: Mapping[str, Any]) -> str:
    """What config.json holds."""
    return json.dumps({"config": dataclasses.asdict(config), **about}, indent=2)


@contextlib.contextmanager
def writing(stem: Path) -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into one sentence.

    Raises:
        CheckpointError: naming the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"could not write {stem}: {reason}; the checkpoints before it are whole: make room and go on with --resume."
        ) from error
