"""Saves the step that gave a non-finite gradient, so that replay.py can run it again.

From that step on the optimiser leaves the weights alone (`Trainer.__init__`). When the trainer notices, at the next
log line or checkpoint, they are still those from before the step; the batch is made again from its seeds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixmim_serve.description import Description
from mixmim_serve.errors import NonFiniteError
from mixmim_serve.files import atomic_path
from mixmim_serve.model.checkpoint import save_checkpoint
from training.data import Batch
from training.distributed import World


@dataclass(frozen=True)
class BadStep:
    """One process's share of a step with non-finite gradients."""

    number: int  # counted from 0
    seed: int  # of the run
    parts: Sequence[Batch]  # accumulated one after the other
    images: Sequence[str]  # keys of the process's images


def save_nonfinite(
    run: Path,
    world: World,
    weights: Mapping[str, Tensor],
    description: Description,
    step: BadStep,
    objective: Mapping[str, Any],
) -> NonFiniteError:
    """Write RUN/nonfinite and return the error to raise; every process must call this.

    `objective` is what the objective needs besides the weights (`Objective.resume_state`).
    """
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{part}.{name}": getattr(batch, name) for part, batch in enumerate(step.parts) for name in Batch._fields[:-1]
    }
    with atomic_path(folder / f"batch-rank{world.rank}.safetensors") as path:
        save_file(tensors, path)
    if world.main:
        save_checkpoint(folder / "weights.safetensors", weights, description)
        if objective:
            with atomic_path(folder / "objective.pt") as path:
                torch.save(dict(objective), path)
        report = {"step": step.number, "seed": step.seed, "processes": world.size, "parts": len(step.parts)}
        with atomic_path(folder / "report.json") as path:
            path.write_text(json.dumps(report | {"images": list(step.images)}, indent=2) + "\n")
    world.wait()
    return NonFiniteError(
        f"the gradients of step {step.number + 1} are not finite; the weights, batch and seed from before it are in "
        f"{folder}: inspect the step with `mixmim replay {shlex.quote(str(run))}`, then resume with --resume and a "
        "lower --set base_lr=, or with --set bf16=false."
    )
