"""A run's folder. Only the first process writes to it, except to unreadable.txt and nonfinite/.

RUN/config.json          the resolved configuration, data and command
RUN/metrics.jsonl        one line every `log_every` steps, and one per evaluation
RUN/events.out.tfevents* the same for TensorBoard
RUN/unreadable.txt       unreadable images, with the reason
RUN/checkpoints/         step-N.safetensors (weights), and of the last one step-N.state.pt (what else --resume needs)
RUN/report.html          the same as curves, with the pictures and what they say (report/)
RUN/samples/             pictures of reconstructions and of nearest neighbours
RUN/nonfinite/           the step that gave a non-finite gradient (replay.py)
RUN/final.safetensors    the weights after the last epoch
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError, InUseError
from mixmim_serve.files import atomic_path
from mixmim_serve.locks import LOCK, lock_folder
from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint
from mixmim_serve.runs import FINAL
from mixmim_serve.strict_json import read_json
from training.config import AUTO, RunConfig

# These change no number.
MAY_CHANGE = {"workers", "max_unreadable", "save_steps", "keep_last", "keep_every", "monitor", "report"}
MAY_HELP = {"base_lr", "bf16", "compile"}  # to rescue a run; changes are recorded in config.json


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.final = path / FINAL
        self.checkpoints = path / "checkpoints"
        self.unreadable: dict[str, None] = {}  # an ordered set
        self.pending: dict[str, list[Any]] = {}  # changed fields of MAY_HELP: {name: [before, now]}
        self.changes: list[dict[str, Any]] = []  # {"step": step, name: [before, now]}

    def create(self, config: RunConfig, metadata: Mapping[str, Any], overwrite: bool = False) -> None:
        """Start an empty run with its configuration.

        Raises:
            ConfigError: when the folder is not empty, unless it holds a run and `overwrite` is set.
        """
        if self.path.exists() and any(path.name != LOCK for path in self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"{self.path} is not empty: choose another folder for --out, continue the run with --resume, or "
                    "replace it with --overwrite; nothing was changed."
                )
            if not (self.path / "config.json").is_file():
                raise ConfigError(f"{self.path} is not a run folder (no config.json): nothing was overwritten.")
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        self.checkpoints.mkdir(parents=True)
        self.write_config(config, metadata)

    def write_config(self, config: RunConfig, metadata: Mapping[str, Any]) -> None:
        """Write config.json."""
        with atomic_path(self.path / "config.json") as path:
            path.write_text(as_json(config, metadata) + "\n")

    def about(self) -> Any:
        """The content of config.json; {} when there is none.

        Raises:
            ConfigError: when it is damaged.
        """
        path = self.path / "config.json"
        if not path.is_file():
            return {}
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged ({error}): start the run anew in another folder.") from error

    def check(self, config: RunConfig, metadata: Mapping[str, Any]) -> None:
        """Compare with the configuration of the run to resume; `record_changes` then records allowed differences.

        Raises:
            ConfigError: when there is no run, or naming the fields that must not differ.
        """
        saved = self.about()
        if not saved:
            raise ConfigError(f"{self.path} holds no run to resume (no config.json): start it without --resume.")
        before, now = (
            values.get("config", {}) | {"task": values.get("task"), "start": values.get("start")}
            for values in (saved, json.loads(as_json(config, metadata)))
        )
        # An earlier version wrote no setting that is newer; it did what the default does.
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        differing = {
            name: [before.get(name), value]
            for name, value in now.items()
            if name not in MAY_CHANGE and before.get(name, defaults.get(name)) != value
        }
        if not differing.keys() <= MAY_HELP:
            listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in differing.items())
            raise ConfigError(f"{self.path} was started with {listed}: resume it with its original options.")
        if now["compile"] == AUTO:  # does what the run has done so far
            differing.pop("compile", None)
        self.changes = saved.get("changes", [])
        self.pending = differing

    def record_changes(self, step: int) -> str:
        """Add the differences that `check` found to `changes`, as of `step`; returns them in words."""
        if self.pending:
            self.changes.append({"step": step, **self.pending})
        return ", ".join(f"{name} {new} (was {old})" for name, (old, new) in self.pending.items())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process; the lock ends with the process, however it ends.

        Raises:
            ConfigError: when another process holds the lock.
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
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def note_unreadable(self, reasons: tuple[str, ...]) -> None:
        """Append new unreadable images to unreadable.txt, each once."""
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self.unreadable]
        self.unreadable.update(dict.fromkeys(new))
        if new:
            with (self.path / "unreadable.txt").open("a") as file:
                file.writelines(f"{reason}\n" for reason in new)

    def save(self, step: int, weights: Mapping[str, Tensor], description: Description, state: dict[str, Any]) -> None:
        """Write a checkpoint; it counts once its state, written last, exists.

        Raises:
            CheckpointError: when it cannot be written; earlier ones are kept.
        """
        stem = self.checkpoints / f"step-{step:08d}"
        with writing(stem):
            save_checkpoint(stem.with_suffix(".safetensors"), weights, description)
            with atomic_path(stem.with_suffix(".state.pt")) as temporary:
                torch.save(state, temporary)

    def save_picture(self, name: str, epochs: int, picture: Image.Image) -> None:
        """Write samples/NAME-epoch-NNNN.png."""
        with atomic_path(self.path / "samples" / f"{name}-epoch-{epochs:04d}.png") as temporary:
            picture.save(temporary, "PNG")

    def finish(self, weights: Mapping[str, Tensor] | None, description: Description) -> None:
        """Make the last checkpoint the final one, or these weights.

        A hard link to the last checkpoint takes no space, where the file system has them.

        Raises:
            CheckpointError: when it cannot be written.
        """
        if weights is not None:
            with writing(self.final.with_suffix("")):
                return save_checkpoint(self.final, weights, description)
        last = self.checkpoints / f"step-{self.steps()[-1]:08d}.safetensors"
        with writing(self.final.with_suffix("")), atomic_path(self.final) as temporary:
            temporary.unlink()
            try:
                temporary.hardlink_to(last)
            except OSError:
                shutil.copyfile(last, temporary)

    def size(self) -> int:
        """Bytes on disk; a file with two names counts once."""
        files = {(about.st_dev, about.st_ino): about.st_size for path in self.path.rglob("*")
                 if S_ISREG((about := path.lstat()).st_mode)}  # fmt: skip
        return sum(files.values())

    def in_words(self) -> str:
        """What the run takes on disk."""
        return f"{self.path} takes {self.size() / 1e6:.0f} MB: {len(self.saved())} checkpoints and one state to resume"

    def prune(self, config: RunConfig, epoch: int) -> None:
        """Keep the last state, and weights of the last few and of every `keep_every` epochs of `epoch` steps each."""
        *earlier, last = self.steps()
        for step in earlier:
            (self.checkpoints / f"step-{step:08d}.state.pt").unlink()
        for step in [step for step in self.saved() if step <= last][: -config.keep_last]:
            if step % (config.keep_every * epoch):
                (self.checkpoints / f"step-{step:08d}.safetensors").unlink()

    def saved(self) -> list[int]:
        """Steps whose weights are kept, oldest first."""
        return sorted(int(path.name[5:13]) for path in self.checkpoints.glob("step-????????.safetensors"))

    def steps(self) -> list[int]:
        """Steps that a run can resume from, oldest first: the last one, or more in folders of earlier versions."""
        return sorted(int(path.name[5:13]) for path in self.checkpoints.glob("step-????????.state.pt"))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights and state of the last checkpoint, or None before the first.

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
            kept = [step for step in self.saved() if step < steps[-1]]
            advice = "start the run again"
            if len(steps) > 1:
                advice = "delete its two files to resume from the one before"
            elif kept:
                advice += f", or go on from the weights of step {kept[-1]} with --from"
            raise CheckpointError(f"the checkpoint {stem} is damaged: {advice}.") from error

    def rewind(self, step: int) -> None:
        """Drop what the resumed run writes again: log lines and weights after `step`, and what was cut in writing.

        From step 0 a run starts anew, with the measures before its first step.
        """
        for cut in self.checkpoints.glob(".step-*.tmp"):
            cut.unlink()
        for later in self.saved():
            if later > step > 0:
                (self.checkpoints / f"step-{later:08d}.safetensors").unlink()
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() and step else ():
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


def as_json(config: RunConfig, metadata: Mapping[str, Any]) -> str:
    """The content of config.json."""
    return json.dumps({"config": dataclasses.asdict(config), **metadata}, indent=2)


@contextlib.contextmanager
def writing(stem: Path) -> Iterator[None]:
    """Turn a write error, such as a full disk, into one sentence.

    Raises:
        CheckpointError: with the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"could not write {stem}: {reason}; earlier checkpoints are intact: free some space, then use --resume."
        ) from error
