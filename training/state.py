"""The state of a run, saved whole: what is resumed from it is, on a CPU, what would have come to the last bit.

Saved: weights, optimiser, step, the generator of the masks, and the sums since the last line of the log. Not saved,
because (seed, epoch, index) give them again: the order of the images and their augmentation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import atomic_path
from training.config import PretrainConfig

STATE = "state.pt"  # in the run folder; the last one only, beside the checkpoints
MAY_CHANGE = ("workers",)  # of a resumed run, without changing its numbers


def save_state(run: Path, state: dict[str, Any]) -> None:
    """Write the state; the old one stays until the new one is whole."""
    with atomic_path(run / STATE) as temporary:
        torch.save(state, temporary)


def load_state(run: Path) -> dict[str, Any] | None:
    """The last state, or None where none was saved yet.

    Raises:
        CheckpointError: when the file is damaged.
    """
    path = run / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged: start the run anew in another folder.") from error
    return state


def check_config(run: Path, config: PretrainConfig) -> None:
    """Compare with the configuration that the run was started with.

    Raises:
        ConfigError: when there is no run, or naming what differs.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run} holds no run to resume (no config.json): start it without --resume.")
    started = json.loads(path.read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    differing = [
        f"{name} {started.get(name)} (now {value})"
        for name, value in now.items()
        if name not in MAY_CHANGE and started.get(name) != value
    ]
    if differing:
        raise ConfigError(f"{run} was started with {', '.join(differing)}: resume it with the options of its start.")


def fingerprint_of(paths: list[Path], folder: Path) -> str:
    """Changes when an image is added, removed or renamed."""
    names = "\n".join(path.relative_to(folder).as_posix() for path in paths)
    return hashlib.sha256(names.encode()).hexdigest()


def trim_metrics(path: Path, step: int) -> None:
    """Drop lines after `step`, and a line that was cut while it was written: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except ValueError:
            break
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept))
