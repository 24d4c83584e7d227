"""Imports public checkpoints of MixMIM, Swin and PVT: `layouts.py` knows their names, `infer.py` their shapes.

Files are {"model": weights, ...} (official), {"state_dict": weights, ...} (mmpretrain), or weights alone, as torch or
safetensors files. Pickled code is never executed. A weight that is left over or missing is an error.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixmim_serve.config import Architecture, Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import sha256
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import check_weights, save_checkpoint
from mixmim_serve.model.infer import INFER, masked_input
from mixmim_serve.model.layouts import layout_of, rename

# Both follow from the architecture.
DERIVED = ("relative_position_index", "attn_mask")


@dataclass(frozen=True)
class Released:
    """A public checkpoint: weights under our names, and what else the file contains."""

    source: str  # the layout's name
    weights: dict[str, Tensor]
    labels: tuple[str, ...] = ()
    normalize_targets: bool = True
    family: str = "mixmim"
    image_size: int = 0  # pixels, where the weights do not show it and the file does


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` wrote, and what it had to assume."""

    description: Description
    notes: tuple[str, ...]


def import_checkpoint(
    source: Path, target: Path, image_size: int = 0, decoder_heads: int = 0, window: int = 0
) -> Imported:
    """Convert a public checkpoint to ours, resized to `image_size` and `window` if given.

    Raises:
        CheckpointError: when the file is no known checkpoint, contains code, or has inconsistent weights.
        ConfigError: when input size or window do not fit the network.
    """
    released = read_released(source)
    own, notes = infer_architecture(source, released, decoder_heads)
    check_weights(source, _shapes(released.weights), _empty_model(own))
    arch = own.resized(image_size, (window,) if window else ())
    weights = released.weights if arch == own else resize_weights(released.weights, own, arch)
    description = Description(
        arch,
        Preprocessing.evaluation(arch.image_size),
        released.labels,
        {"source": source.name, "sha256": sha256(source), "layout": released.source},
    )
    save_checkpoint(target, weights, description)
    return Imported(description, () if image_size else notes)


def read_released(path: Path) -> Released:
    """The weights of a public checkpoint under our names and in our order.

    Raises:
        CheckpointError: when the file is not one.
    """
    content = _load(path)
    holder = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name).removeprefix("module."): value for name, value in holder.items() if isinstance(value, Tensor)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED)}
    try:
        layout = layout_of(kept)
        weights = rename(kept, layout)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    normalize = bool(getattr(content.get("args"), "norm_pix_loss", True))
    return Released(layout.name, weights, _labels(content), normalize, layout.family, masked_input(tensors))


def infer_architecture(path: Path, released: Released, decoder_heads: int = 0) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture that fits the weights' shapes, and notes on what the shapes leave open.

    Raises:
        CheckpointError: when the shapes fit no network of the family.
    """
    infer = INFER[released.family]
    try:
        return infer(released.weights, released.source, released.image_size, decoder_heads, released.normalize_targets)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} lacks weights: {error} is missing or misshapen. Is it a checkpoint of this network?"
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{path} holds no network of the family {released.family}: {error}") from error


def resize_weights(weights: Mapping[str, Tensor], old: Architecture, new: Architecture) -> dict[str, Tensor]:
    """Weights for another input size or other windows; those that `new` does not have are dropped.

    Position embeddings and bias tables are resized bicubically (align_corners=False), the rule of the official
    `util/pos_embed.py`; the learned position embeddings of PVT bilinearly, as its own code does.

    Raises:
        CheckpointError: when another weight differs in shape.
    """
    expected = _shapes(_empty_model(new).state_dict())
    resized = {}
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) == shape:
            resized[name] = tensor
        elif name.endswith(".pos_embed"):
            resized[name] = _resize_grid(tensor[0], math.isqrt(shape[1]), "bilinear").unsqueeze(0)
        elif name.endswith("pos_embed"):
            resized[name] = _resize_grid(tensor[0], math.isqrt(shape[1])).unsqueeze(0)
        elif name.endswith("relative_position_bias_table"):
            resized[name] = _resize_grid(tensor, math.isqrt(shape[0]))
        else:
            raise CheckpointError(f"{name} cannot be resized from {old.image_size} to {new.image_size} px.")
    return resized


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_why_refused(str(error))}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a complete torch checkpoint (.pth or .safetensors).") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a checkpoint or a state dict.")
    return content


def _why_refused(message: str) -> str:
    """One sentence instead of torch's page of advice, which suggests to switch the protection off."""
    forbidden = re.search(r"(?:GLOBAL|class|function|global) ([\w.]+)", message)
    if "Unsupported" in message and forbidden:
        return f"contains more than weights ({forbidden[1]}) and was not loaded: import only its state dict."
    return "is not a torch checkpoint, or contains more than weights: expected a .pth file with a state dict."


def _labels(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names that mmpretrain stores."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    return tuple(str(name) for name in classes) if isinstance(classes, list | tuple) else ()


def _resize_grid(values: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """(grid * grid, C) to (side * side, C)."""
    old = math.isqrt(values.shape[0])
    grid = values.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(side, side), mode=mode, align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(side * side, -1).contiguous()


def _empty_model(arch: Architecture) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(arch)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
