"""Imports checkpoints of the two public implementations.

Official (Sense-X/MixMIM): {"model": weights, "args": argparse.Namespace, ...}; its names are ours.
mmpretrain 1.2: {"meta": ..., "state_dict": weights, ...}; other names, another order in patch merging, position
embeddings transposed (their values are copied, never recomputed), decoder norms with eps 1e-6.
A bare state dict of either is accepted too. Names tell the implementation, shapes the architecture.
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

from mixmim_serve.config import PATCH_SIZE, STAGES, Architecture, DecoderConfig, Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError
from mixmim_serve.files import sha256
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import check_weights, save_checkpoint

# Both follow from the architecture; only old Swin code saved the attention mask.
DERIVED = ("relative_position_index", "attn_mask")

# Applied in this order to mmpretrain's names. Source: mmpretrain/models/backbones/mixmim.py and necks/mixmim_neck.py.
MMPRETRAIN_NAMES = (
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^(backbone|neck)\.", ""),
    (r"^head\.fc\.", "head."),
    (r"\bprojection\.", "proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
MMPRETRAIN_DECODER_EPS = 1e-6

# The number of decoder heads does not show in the shapes. Every published model has 16 for 512 channels;
# for other widths 16 channels per head are assumed, with a note.
PUBLISHED_DECODER = (512, 16)
ASSUMED_HEAD_DIM = 16


@dataclass(frozen=True)
class Released:
    """A public checkpoint: weights under our names, and what else the file contains."""

    source: str  # "official" or "mmpretrain"
    weights: dict[str, Tensor]
    labels: tuple[str, ...] = ()
    normalize_targets: bool = True


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` wrote, and what it had to assume."""

    description: Description
    notes: tuple[str, ...]


def import_checkpoint(source: Path, target: Path, image_size: int = 0, decoder_heads: int = 0) -> Imported:
    """Convert a public checkpoint to ours, resized to `image_size` if given.

    Raises:
        CheckpointError: when the file is not a MixMIM checkpoint, contains code, or has inconsistent weights.
    """
    released = read_released(source)
    arch, notes = infer_architecture(source, released, decoder_heads)
    check_weights(source, _shapes(released.weights), _empty_model(arch))
    weights = released.weights
    if image_size and image_size != arch.image_size:
        old, arch = arch, arch.at(image_size)
        weights = resize_weights(weights, old, arch)
    description = Description(
        arch,
        Preprocessing.evaluation(arch.image_size),
        released.labels,
        {"source": source.name, "sha256": sha256(source), "layout": released.source},
    )
    save_checkpoint(target, weights, description)
    return Imported(description, notes)


def read_released(path: Path) -> Released:
    """The weights of an official or mmpretrain checkpoint under our names and in our order.

    Raises:
        CheckpointError: when the file is not one.
    """
    content = _load(path)
    holder = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name).removeprefix("module."): value for name, value in holder.items() if isinstance(value, Tensor)}
    if not any(name.endswith("absolute_pos_embed") for name in tensors):
        raise CheckpointError(
            f"{path} holds no MixMIM weights: expected an official or mmpretrain checkpoint, or its state dict."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED)}
    if any(name.startswith("backbone.") for name in tensors):
        return Released("mmpretrain", _from_mmpretrain(tensors), _labels(content))
    normalize = bool(getattr(content.get("args"), "norm_pix_loss", True))
    return Released("official", tensors, normalize_targets=normalize)


def infer_architecture(path: Path, released: Released, decoder_heads: int = 0) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture that fits the weights' shapes, and notes on what the shapes leave open.

    Raises:
        CheckpointError: when the shapes fit no MixMIM network.
    """
    weights = released.weights
    try:
        tables = [weights[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(STAGES)]
        decoder, notes = _infer_decoder(released, decoder_heads)
        arch = Architecture(
            embed_dim=weights["patch_embed.proj.weight"].shape[0],
            depths=tuple(_count(weights, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(STAGES)),
            heads=tuple(table.shape[1] for table in tables),
            image_size=math.isqrt(weights["absolute_pos_embed"].shape[1]) * PATCH_SIZE,
            windows=tuple((math.isqrt(table.shape[0]) + 1) // 2 for table in tables),
            decoder=decoder,
            num_classes=weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} lacks weights: {error} is missing or misshapen. Is it a MixMIM checkpoint?"
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{path} holds no MixMIM network: {error}") from error
    return arch, notes


def resize_weights(weights: Mapping[str, Tensor], old: Architecture, new: Architecture) -> dict[str, Tensor]:
    """Weights for another input size: position embeddings and bias tables resized bicubically (align_corners=False).

    The rule of the official `util/pos_embed.py`. Weights that `new` does not have are dropped.

    Raises:
        CheckpointError: when another weight differs in shape.
    """
    expected = _shapes(_empty_model(new).state_dict())
    resized = {}
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) == shape:
            resized[name] = tensor
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


def _from_mmpretrain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in tensors.items():
        for pattern, replacement in MMPRETRAIN_NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = _reorder_merging(tensor) if ".downsample." in name else tensor
    return weights


def _reorder_merging(tensor: Tensor) -> Tensor:
    """From unfold's order, channel * 4 + 2 dy + dx, to all channels of neighbour (0,0), then (1,0), (0,1), (1,1).

    The last axis is the merged one, both of the norm (4C) and of the linear layer's weight (2C, 4C).
    """
    by_neighbour = tensor.view(*tensor.shape[:-1], -1, 4).transpose(-1, -2)
    reordered: Tensor = by_neighbour[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
    return reordered


def _labels(content: Mapping[str, Any]) -> tuple[str, ...]:
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    return tuple(str(name) for name in classes) if isinstance(classes, list | tuple) else ()


def _infer_decoder(released: Released, heads: int) -> tuple[DecoderConfig | None, tuple[str, ...]]:
    weights = released.weights
    if "decoder_embed.weight" not in weights:
        return None, ()
    dim = weights["decoder_embed.weight"].shape[0]
    notes: tuple[str, ...] = ()
    if not heads and dim == PUBLISHED_DECODER[0]:
        heads = PUBLISHED_DECODER[1]
    elif not heads:
        heads = max(1, dim // ASSUMED_HEAD_DIM)
        notes = (
            f"the file does not say how many decoder heads: assumed {heads} for {dim} channels, see --decoder-heads",
        )
    decoder = DecoderConfig(
        dim=dim,
        depth=_count(weights, r"decoder_blocks\.(\d+)\."),
        heads=heads,
        norm_eps=MMPRETRAIN_DECODER_EPS if released.source == "mmpretrain" else 1e-5,
        normalize_targets=released.normalize_targets,
    )
    return decoder, notes


def _resize_grid(values: Tensor, side: int) -> Tensor:
    """(grid * grid, C) to (side * side, C)."""
    old = math.isqrt(values.shape[0])
    grid = values.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(side * side, -1).contiguous()


def _empty_model(arch: Architecture) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(arch)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """The number of distinct indices that `pattern` captures in the names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})
