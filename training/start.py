"""The weights that a run starts from: untrained, a checkpoint's, or a bundle's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mixmim_serve.bundle import WEIGHTS
from mixmim_serve.description import Description
from mixmim_serve.files import sha256
from mixmim_serve.model import Encoder
from mixmim_serve.model.checkpoint import build_from_weights, read_checkpoint

SCRATCH = "scratch"  # in place of a checkpoint: random weights


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from."""

    path: Path
    description: Description
    weights: dict[str, Tensor]

    @property
    def identity(self) -> str:
        """A hash of the file: the same weights have the same identity at any path."""
        return f"sha256:{sha256(self.path)[:16]}"

    def model(self) -> Encoder:
        """The checkpoint's network, with its weights.

        Raises:
            CheckpointError: when the weights do not fit.
        """
        return build_from_weights(self.path, self.description, self.weights)


def read_start(path: Path) -> Start:
    """Read a checkpoint file, or the one in a bundle folder; weights become float32.

    Raises:
        CheckpointError: when the file is missing, damaged or not ours.
    """
    path = path / WEIGHTS if path.is_dir() else path
    description, weights = read_checkpoint(path)
    return Start(path, description, {name: weight.float() for name, weight in weights.items()})
