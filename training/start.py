"""The weights that a run starts from: untrained, a checkpoint's, a bundle's, or another run's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmim_serve.bundle import CONFIG, WEIGHTS
from mixmim_serve.config import Architecture, architecture, size_name
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import sha256
from mixmim_serve.model import Encoder, build_model
from mixmim_serve.model.checkpoint import build_from_weights, check_weights, read_checkpoint
from mixmim_serve.model.released import resize_weights
from mixmim_serve.runs import FINAL, is_run
from mixmim_serve.strict_json import read_json

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

    @property
    def name(self) -> str:
        """What a person calls it: a bundle's folder, else the file's path."""
        return self.path.parent.name if self.path.name == WEIGHTS else str(self.path)

    def model(self) -> Encoder:
        """The checkpoint's network, with its weights.

        Raises:
            CheckpointError: when the weights do not fit.
        """
        return build_from_weights(self.path, self.description, self.weights)

    def check_size(self, size: str) -> None:
        """Check that this is the network of a named size, at any input size; an empty name asks for none.

        Raises:
            ConfigError: when it is another, or there is no such size.
        """
        own, name = self.description.arch, size_name(self.description.arch)
        if not size or size in (name, name.partition("@")[0]):
            return
        what = f"has size {name}"
        if architecture(size).family != own.family:
            what = f"is a {own.family} network of size {name}"
        raise ConfigError(f"{self.name} {what}, not {size}: omit size to use the checkpoint's own.")

    def weights_for(self, arch: Architecture) -> dict[str, Tensor]:
        """The weights of this network, resized to its input size; bit-equal to the checkpoint's at the same size.

        What `arch` lacks, head or decoder, is dropped.

        Raises:
            CheckpointError: when some are missing or misshapen.
        """
        own = self.description.arch
        same_size = dataclasses.replace(arch, image_size=own.image_size, windows=own.windows)
        with torch.device("meta"):
            model = build_model(same_size)
        wanted = model.state_dict().keys() & self.weights.keys()
        check_weights(self.path, {name: tuple(self.weights[name].shape) for name in wanted}, model)
        return resize_weights(self.weights, own, arch)

    def origin(self) -> dict[str, Any]:
        """For the provenance of what is trained from here: name, identity, a bundle's fingerprint, its own origin."""
        about: dict[str, Any] = {"name": self.name, "identity": self.identity}
        if self.path.name == WEIGHTS and (self.path.parent / CONFIG).is_file():
            about["fingerprint"] = read_json(self.path.parent / CONFIG).get("fingerprint")
        earlier = self.description.provenance.get("origin")
        return about | ({"origin": earlier} if earlier else {})


def read_start(path: Path) -> Start:
    """Read a checkpoint file, or the one in a bundle or in the folder of a finished run; weights become float32.

    Raises:
        CheckpointError: when the file is missing, damaged or not ours, or the run has not finished.
    """
    if is_run(path) and not (path / FINAL).is_file():
        raise CheckpointError(
            f"{path} is a run that has not finished: finish it with --resume, or give a file of {path / 'checkpoints'}."
        )
    if path.is_dir():
        path = path / (FINAL if (path / FINAL).is_file() else WEIGHTS)
    description, weights = read_checkpoint(path)
    return Start(path, description, {name: weight.float() for name, weight in weights.items()})
