"""The model description that checkpoints and bundles store, as plain JSON. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mixmim_serve.config import Architecture, Preprocessing, architecture_from_dict, preprocessing_from_dict
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.strict_json import parse_json

METADATA_KEY = "mixmim"  # in the header of a safetensors checkpoint
FORMAT = 1  # of checkpoints; increased when an older reader would misread the file


@dataclass(frozen=True)
class Description:
    """Everything needed to rebuild a model and its input, and where its weights come from."""

    arch: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()  # one per class, in the order of the logits
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON values: source, command, data, versions

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.labels and len(self.labels) != self.arch.num_classes:
            raise ConfigError(f"{len(self.labels)} labels for {self.arch.num_classes} classes: give one per class.")
        if self.preprocessing.image_size != self.arch.image_size:
            raise ConfigError(
                f"preprocessing produces {self.preprocessing.image_size} px, the network expects "
                f"{self.arch.image_size} px."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return {
            "architecture": dataclasses.asdict(self.arch),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "labels": list(self.labels),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """The inverse of `to_dict`; other keys are ignored.

        Raises:
            ConfigError: for missing or wrong values.
        """
        try:
            return cls(
                arch=architecture_from_dict(values["architecture"]),
                preprocessing=preprocessing_from_dict(values["preprocessing"]),
                labels=tuple(values.get("labels", ())),
                provenance=values.get("provenance", {}),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the model description is incomplete: {error} is missing or wrong.") from error


def read_description(path: Path) -> Description:
    """The description in a checkpoint; the weights are not read.

    Raises:
        CheckpointError: when the file is missing, damaged or has no description.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors checkpoint.")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: for other formats use `mixmim import`."
        ) from error
    if text is None:
        raise CheckpointError(f"{path} has weights without a model description: run `mixmim import` on it first.")
    try:
        values = parse_json(text)
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {values.get('format')}, this version reads {FORMAT}: update mixmim-serve."
            )
        return Description.from_dict(values)
    except (ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} has a damaged description: {error}") from error
