"""The architecture that fits a public checkpoint, by the shapes of its weights; what they leave open becomes a note."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from torch import Tensor

from mixmim_serve.config import PATCH_SIZE, STAGES, UNIT_SIZE, Architecture, DecoderConfig
from mixmim_serve.families import FAMILIES

MMPRETRAIN_DECODER_EPS = 1e-6

# The number of decoder heads does not show in the shapes. Every published model has 16 for 512 channels;
# for other widths 16 channels per head are assumed, with a note.
PUBLISHED_DECODER = (512, 16)
ASSUMED_HEAD_DIM = 16

Weights = Mapping[str, Tensor]
Inferred = tuple[Architecture, tuple[str, ...]]


def infer_mixmim(weights: Weights, layout: str, image_size: int, decoder_heads: int, normalize: bool) -> Inferred:
    """MixMIM: windows by the bias tables, the input size by the position embedding."""
    tables = [weights[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(STAGES)]
    decoder, notes = _infer_decoder(weights, layout, decoder_heads, normalize)
    arch = Architecture(
        embed_dim=weights["patch_embed.proj.weight"].shape[0],
        depths=_depths(weights),
        heads=tuple(table.shape[1] for table in tables),
        image_size=math.isqrt(weights["absolute_pos_embed"].shape[1]) * PATCH_SIZE,
        windows=tuple(_window(table) for table in tables),
        decoder=decoder,
        num_classes=_classes(weights),
    )
    return arch, notes


def infer_swin(weights: Weights, layout: str, image_size: int, decoder_heads: int, normalize: bool) -> Inferred:
    """Swin: windows by the bias tables; the input size shows in the official files' attention masks alone."""
    tables = [weights[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(STAGES)]
    window = _window(tables[0])
    notes: tuple[str, ...] = ()
    if not image_size:
        image_size = window * UNIT_SIZE
        notes = (
            f"the file does not say its input size: assumed {image_size} px, as published for windows of {window}, "
            "see --image-size",
        )
    arch = Architecture(
        embed_dim=weights["patch_embed.proj.weight"].shape[0],
        depths=_depths(weights),
        heads=tuple(table.shape[1] for table in tables),
        image_size=image_size,
        windows=tuple(_window(table) for table in tables),
        num_classes=_classes(weights),
        family="swin",
    )
    return arch, notes


def infer_pvt(weights: Weights, layout: str, image_size: int, decoder_heads: int, normalize: bool) -> Inferred:
    """PVT: every published size has as many heads as multiples of the first stage's channels."""
    arch = Architecture(
        embed_dim=weights["patch_embed.proj.weight"].shape[0],
        depths=_depths(weights),
        heads=FAMILIES["pvt"].widths,
        image_size=math.isqrt(weights["layers.0.pos_embed"].shape[1]) * PATCH_SIZE,
        num_classes=_classes(weights),
        family="pvt",
        class_token=f"layers.{STAGES - 1}.cls_token" in weights,
    )
    return arch, ()


INFER: dict[str, Callable[[Weights, str, int, int, bool], Inferred]] = {
    "mixmim": infer_mixmim,
    "swin": infer_swin,
    "pvt": infer_pvt,
}


def masked_input(tensors: Weights) -> int:
    """The input size in pixels for which an official Swin's attention mask (windows, N, N) was made; 0 without one."""
    mask = tensors.get("layers.0.blocks.1.attn_mask")
    return 0 if mask is None else math.isqrt(mask.shape[0]) * math.isqrt(mask.shape[1]) * PATCH_SIZE


def _infer_decoder(
    weights: Weights, layout: str, heads: int, normalize: bool
) -> tuple[DecoderConfig | None, tuple[str, ...]]:
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
        norm_eps=MMPRETRAIN_DECODER_EPS if layout == "mmpretrain" else 1e-5,
        normalize_targets=normalize,
    )
    return decoder, notes


def _depths(weights: Weights) -> tuple[int, ...]:
    return tuple(_count(weights, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(STAGES))


def _window(table: Tensor) -> int:
    """The window of a bias table with (2 * window - 1) ** 2 rows."""
    return (math.isqrt(table.shape[0]) + 1) // 2


def _classes(weights: Weights) -> int:
    return weights["head.weight"].shape[0] if "head.weight" in weights else 0


def _count(weights: Weights, pattern: str) -> int:
    """The number of distinct indices that `pattern` captures in the names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})
