"""The interface between the trainer and what it trains: an objective, its inputs, its evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
    """A module whose forward is the loss of `model`; it may have weights of its own, which no checkpoint keeps."""

    model: Encoder
    crops: int = 1  # crops of each image in a batch, one below the other

    @property
    def crop_size(self) -> int:
        """Pixels on one side of the crops in a batch."""
        return self.model.arch.image_size

    @property
    def kept(self) -> Encoder:
        """The network that is evaluated and becomes the final checkpoint."""
        return self.model

    def final_weights(self) -> dict[str, Tensor] | None:
        """Those of `kept`, if it is another network than `model`."""
        return None if self.kept is self.model else self.kept.state_dict()

    def after_step(self, progress: float) -> None:
        """Called after each update, with the share of the run's steps before it."""

    def readings(self, world: World) -> dict[str, float]:
        """Means for the log since the last call, by name; every process must call this."""
        return {}

    def resume_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights of `model`."""
        return {}

    def load_resume_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `resume_state`."""


class MeanReadings(Objective):
    """An objective that logs means of what each step notes, by name; a compiled step can note it too."""

    names: Sequence[str]
    sums: Tensor

    def log_means_of(self, names: Sequence[str]) -> None:
        """Say what each step will note; call it once, in `__init__`."""
        self.names = names
        # Of what the log reads since its last line, and of the steps. One tensor, so that a compiled step can add.
        self.register_buffer("sums", torch.zeros(len(names) + 1), persistent=False)

    def note(self, values: Sequence[Tensor]) -> None:
        """Add a step's values, in the order of `names`."""
        self.sums += torch.stack([*(each.detach().float() for each in values), torch.ones_like(self.sums[0])])

    def readings(self, world: World) -> dict[str, float]:
        """See `Objective`."""
        *means, _ = world.mean(self.sums / self.sums[-1]).tolist()
        self.sums.zero_()
        return {name: round(value, 6) for name, value in zip(self.names, means, strict=True)}


class Task(Protocol):
    """Pretraining (pretraining.py), distillation (distillation.py) or fine-tuning (finetuning.py)."""

    name: str
    objective: Objective
    classes: tuple[str, ...]  # label i is classes[i]; () without labels
    start: str  # identity of the initial weights, for checks and provenance
    origin: Mapping[str, Any]  # where they come from, for provenance; {} for random ones

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""

    def to(self, device: torch.device) -> None:
        """Move the objective and everything it needs to the device."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups, each with `lr_scale`."""

    def inputs(self, batch: Batch, mask_seed: int, seed: int) -> tuple[Tensor, ...]:
        """The objective's arguments, on the device; `mask_seed` is shared by a step's parts."""

    def describe(self, provenance: Mapping[str, Any]) -> Description:
        """The description to store in a checkpoint."""

    def evaluate(self, epochs: int, world: World) -> dict[str, float]:
        """Metrics by name after `epochs` complete epochs, 0 before the first; {} when none are due."""

    def pictures(self, epochs: int) -> dict[str, Image.Image]:
        """Pictures by name after `epochs` complete epochs, 0 before the first; {} when none are due."""


@contextlib.contextmanager
def evaluation(objective: Objective, device: torch.device) -> Iterator[None]:
    """A block in which the network is evaluated; nothing that it draws at random changes the training."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        objective.eval()
        yield
        objective.train()
