"""What the trainer trains: an objective, its inputs and how it is judged (pretraining.py, finetuning.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mixmim_serve.description import Description
from mixmim_serve.model import Encoder
from training.config import RunConfig
from training.data import Batch
from training.distributed import World


class Objective(nn.Module):
    """A module whose forward is the loss of `model`."""

    model: Encoder


class Task(Protocol):
    """What is trained: pretraining.py and finetuning.py."""

    name: str
    objective: Objective
    classes: tuple[str, ...]  # numbered in this order; () without labels
    start: str  # which weights it starts from

    @property
    def config(self) -> RunConfig:
        """The run."""

    def to(self, device: torch.device) -> None:
        """Move the objective, and what else it needs, to the device."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimiser; `lr_scale` in each."""

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """What the objective takes, on the device; `mask_seed` is shared by a step's parts."""

    def describe(self, provenance: Mapping[str, Any]) -> Description:
        """The checkpoint's description."""

    def judge(self, epochs: int, world: World) -> dict[str, float]:
        """Measurements after a whole epoch; {} when none is due."""

    def pictures(self, epochs: int) -> dict[str, Image.Image]:
        """Pictures after a whole epoch, by name; {} when none is due."""
