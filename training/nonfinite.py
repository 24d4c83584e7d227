"""A gradient that is not finite: what led to it is saved, so that replay.py can do the step again.

The optimiser leaves the weights alone from that step on (`Trainer.__init__`), so when it is noticed, at the next line
of the log or checkpoint, they are still those from before it; the batch comes from its seeds again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from mixmim_serve.errors import NonFiniteError
from mixmim_serve.files import atomic_path
from mixmim_serve.model.checkpoint import save_checkpoint
from training.data import Batch, collate
from training.distributed import whole_weights

if TYPE_CHECKING:
    from training.trainer import Trainer


def save_nonfinite(trainer: Trainer, step: int) -> None:
    """Save what led to the gradients of `step` (counted from 0), and stop.

    Raises:
        NonFiniteError: always.
    """
    folder, world = trainer.folder.path / "nonfinite", trainer.world
    weights = whole_weights(trainer.model)
    folder.mkdir(exist_ok=True)
    parts = load_parts(trainer, step)
    tensors = {
        f"{part}.{name}": getattr(batch, name) for part, batch in enumerate(parts) for name in Batch._fields[:-1]
    }
    with atomic_path(folder / f"batch-rank{world.rank}.safetensors") as path:
        save_file(tensors, path)
    if world.main:
        save_checkpoint(folder / "weights.safetensors", weights, trainer.task.describe(trainer.provenance()))
        report = {"step": step, "seed": trainer.config.seed, "processes": world.size, "parts": len(parts)}
        with atomic_path(folder / "report.json") as path:
            path.write_text(json.dumps(report | {"images": keys_of(trainer, step)}, indent=2) + "\n")
    world.wait()
    raise NonFiniteError(
        f"the gradients of step {step + 1} are not finite; weights, batch and seed from before it are in {folder}: "
        f"look at the step with `mixmim replay {trainer.folder.path}`, then go on with --resume and a lower "
        "--set base_lr=, or --set bf16=false."
    )


def step_keys(trainer: Trainer, step: int) -> list[list[tuple[int, int]]]:
    """(epoch, index) of each part of this process's batch."""
    sampler = trainer.sampler
    sampler.epoch, sampler.start = divmod(step, sampler.steps)
    keys = iter(sampler)
    return [next(keys) for _ in range(trainer.config.accumulate)]


def load_parts(trainer: Trainer, step: int) -> list[Batch]:
    """This process's batch of a step, made again from its seeds."""
    return [collate([trainer.dataset[key] for key in part]) for part in step_keys(trainer, step)]


def keys_of(trainer: Trainer, step: int) -> list[str]:
    """Names of the first process's images."""
    return [trainer.source.keys[index] for part in step_keys(trainer, step) for _, index in part]
