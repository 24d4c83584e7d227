"""Training runs from outside: which folders are runs, and which checkpoint of a run to export.

`training/run_folder.py` writes them. Serving only has to tell them from bundles.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmim_serve.errors import CheckpointError
from mixmim_serve.strict_json import read_json

CONFIG, FINAL = "config.json", "final.safetensors"
MAX_CONFIG_BYTES = 16_000_000


def is_run(folder: Path) -> bool:
    """Whether `mixmim pretrain` or `mixmim finetune` wrote a folder."""
    try:
        return is_run_config(read_json(folder / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return False


def is_run_config(values: Any) -> bool:
    """Whether the content of a config.json is that of a run, and not of a bundle."""
    return isinstance(values, Mapping) and {"config", "task"} <= values.keys() and "format" not in values


def checkpoint_of(path: Path) -> tuple[Path, bool]:
    """The checkpoint that a path means, and whether it is final: a file itself; of a run the final one, or the newest.

    Raises:
        CheckpointError: for a folder that is not a run, or a run without a checkpoint.
    """
    if not path.is_dir():
        return path, True
    if not is_run(path):
        raise CheckpointError(f"{path} is neither a checkpoint nor a training run: give a .safetensors file or a run.")
    if (path / FINAL).is_file():
        return path / FINAL, True
    saved = sorted((path / "checkpoints").glob("step-????????.safetensors"))
    if not saved:
        raise CheckpointError(f"{path} has no checkpoint yet: let the run go on, with --resume if it was stopped.")
    return saved[-1], False


def export_advice(path: Path, kind: str) -> str:
    """The sentence for a run or checkpoint that was given in place of a bundle; `kind` says which it is."""
    home = path.parent if path.name == FINAL and is_run(path.parent) else path
    bundle = Path("bundles") / (home.stem if home.is_file() else home.absolute().name)
    command = shlex.join(["mixmim", "export", str(path), str(bundle)])
    return f"{path} is a {kind}, not a bundle: run `{command}`, then use {bundle}."
