"""Our checkpoint: one safetensors file with the weights and everything that rebuilds the model.

The metadata key `mixmim` holds the JSON of a `Description`, so `load_checkpoint(path)` needs nothing else
(as in whisper: dims, model, weights).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmim_serve.description import FORMAT, METADATA_KEY, Description, read_description
from mixmim_serve.errors import CheckpointError
from mixmim_serve.files import atomic_path
from mixmim_serve.model import Encoder, build_model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by a bundle's precision


def save_checkpoint(
    path: Path, weights: Mapping[str, Tensor], description: Description, dtype: torch.dtype | None = None
) -> None:
    """Write weights and description atomically.

    `dtype` stores floating-point weights in another precision (fp16 halves the file); they load as float32.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    # One key: safetensors writes several in random order, so equal checkpoints would differ as files.
    metadata = {METADATA_KEY: json.dumps({"format": FORMAT, **description.to_dict()})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_checkpoint(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """The description, and the weights as stored.

    Raises:
        CheckpointError: when the file is missing, damaged or not ours.
    """
    description = read_description(path)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return description, weights


def load_checkpoint(path: Path) -> tuple[Encoder, Description]:
    """The model in float32 and evaluation mode, and its description.

    Raises:
        CheckpointError: when the file cannot be read or its weights do not fit its description.
    """
    description, weights = read_checkpoint(path)
    return build_from_weights(path, description, weights), description


def build_from_weights(path: Path, description: Description, weights: Mapping[str, Tensor]) -> Encoder:
    """The described model in float32 and evaluation mode, with weights that were read from `path`.

    Raises:
        CheckpointError: when the weights do not fit the description.
    """
    model = build_model(description.arch)
    check_weights(path, {name: tuple(tensor.shape) for name, tensor in weights.items()}, model)
    model.load_state_dict(weights)
    return model.eval()


def check_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Compare the weights' names and shapes with the model's.

    Raises:
        CheckpointError: naming the first missing, unknown or misshapen weights.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has misshapen", misshapen)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{path} {what} weights: {', '.join(names[:3])}{rest}. Is it a checkpoint of this network?"
            )
