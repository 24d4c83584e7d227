"""Public checkpoints by the names of their weights: which implementation wrote them, and what we call each weight.

MixMIM: the official repository (its names are ours) and mmpretrain 1.2, whose patch merging has another order. Swin:
the official repository (its names are ours), timm, and Hugging Face transformers, whose names on disk and, since 5.0,
in memory differ. PVT: the official repository and transformers. Checkpoints carry no code and no architecture: keys
tell the layout, shapes the network (`infer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmim_serve.config import STAGES
from mixmim_serve.errors import CheckpointError

Weights = dict[str, Tensor]
Names = tuple[tuple[str, str], ...]  # regular expressions and replacements, applied in this order


@dataclass(frozen=True)
class Layout:
    """One implementation's way to store a family."""

    name: str
    family: str
    signs: tuple[str, ...]  # each of these regular expressions finds a key
    names: Names = ()
    convert: Callable[[Weights], Weights] = dict  # after renaming


def layout_of(keys: Mapping[str, object]) -> Layout:
    """The layout that has all its signs among these keys.

    Raises:
        CheckpointError: when none has, with the reason for networks that are often tried.
    """
    for layout in LAYOUTS:
        if all(any(re.search(sign, key) for key in keys) for sign in layout.signs):
            return layout
    for sign, what in UNSUPPORTED:
        if any(re.search(sign, key) for key in keys):
            raise CheckpointError(f"holds {what}.")
    raise CheckpointError(
        "holds no weights of MixMIM, Swin or PVT: expected a checkpoint of the official repositories, mmpretrain, timm "
        "or transformers, or its state dict."
    )


def rename(weights: Weights, layout: Layout) -> Weights:
    """The weights under our names and in our order.

    Raises:
        CheckpointError: when a part of a weight is missing.
    """
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in layout.names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return layout.convert(renamed)


# mmpretrain/models/backbones/mixmim.py and necks/mixmim_neck.py
MMPRETRAIN: Names = (
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^(backbone|neck)\.", ""),
    (r"^head\.fc\.", "head."),
    (r"\bprojection\.", "proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


def reorder_merging(weights: Weights) -> Weights:
    """Patch merging from unfold's order, channel * 4 + 2 dy + dx, to neighbours (0,0), (1,0), (0,1), (1,1).

    The last axis is the merged one, both of the norm (4C) and of the linear layer's weight (2C, 4C).
    """
    reordered = {}
    for name, tensor in weights.items():
        if ".downsample." in name:
            by_neighbour = tensor.view(*tensor.shape[:-1], -1, 4).transpose(-1, -2)
            tensor = by_neighbour[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
        reordered[name] = tensor
    return reordered


# timm/models/swin_transformer.py: downsampling stands at the beginning of the next stage
TIMM_SWIN: Names = (
    (r"^layers\.1\.downsample\.", "layers.0.downsample."),
    (r"^layers\.2\.downsample\.", "layers.1.downsample."),
    (r"^layers\.3\.downsample\.", "layers.2.downsample."),
    (r"^head\.fc\.", "head."),
)

# transformers/models/swin/modeling_swin.py; conversion_mapping.py has the names on disk and those in memory
HF_SWIN: Names = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.(q)uery\.|\.attention\.self\.(k)ey\.|\.attention\.self\.(v)alue\.", r".attn.\1\2\3."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.(self|relative_position_bias)\.relative_position_", ".attn.relative_position_"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

# transformers/models/pvt/modeling_pvt.py, to the official names
HF_PVT: Names = (
    (r"^pvt\.", ""),
    *((rf"^encoder\.patch_embeddings\.{stage}\.cls_token$", "cls_token") for stage in range(STAGES)),
    *(
        (rf"^encoder\.patch_embeddings\.{stage}\.position_embeddings$", f"pos_embed{stage + 1}")
        for stage in range(STAGES)
    ),
    *((rf"^encoder\.patch_embeddings\.{stage}\.", f"patch_embed{stage + 1}.") for stage in range(STAGES)),
    *((rf"^encoder\.block\.{stage}\.", f"block{stage + 1}.") for stage in range(STAGES)),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^(patch_embed\d)\.projection\.", r"\1.proj."),
    (r"^(patch_embed\d)\.layer_norm\.", r"\1.norm."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.self\.(q)uery\.|\.attention\.self\.(k)ey\.|\.attention\.self\.(v)alue\.", r".attn.\1\2\3."),
    (r"\.attention\.self\.sequence_reduction\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
)

# classification/pvt.py of the official repository
OFFICIAL_PVT: Names = (
    (r"^patch_embed1\.", "patch_embed."),
    *((rf"^patch_embed{stage + 1}\.", f"layers.{stage - 1}.downsample.") for stage in range(1, STAGES)),
    *((rf"^pos_embed{stage + 1}$", f"layers.{stage}.pos_embed") for stage in range(STAGES)),
    *((rf"^block{stage + 1}\.(\d+)\.", rf"layers.{stage}.blocks.\1.") for stage in range(STAGES)),
    (r"^cls_token$", f"layers.{STAGES - 1}.cls_token"),
)


def join_class_token(weights: Weights) -> Weights:
    """Add the class token's position, which stands first in the last stage's, to the token."""
    token, places = (f"layers.{STAGES - 1}.{name}" for name in ("cls_token", "pos_embed"))
    if token not in weights or places not in weights:
        return weights
    own, others = weights[places][:, :1], weights[places][:, 1:].contiguous()
    return weights | {token: weights[token] + own, places: others}


def join_rows(joined: str) -> Callable[[Weights], Weights]:
    """Joins `attn.q`, `attn.k` and `attn.v`, or of them those that `joined` names, into one weight of that name."""

    def join(weights: Weights) -> Weights:
        result: Weights = {}
        for name, tensor in weights.items():
            match = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
            if match is None or match[2] not in joined:
                result[name] = tensor
                continue
            parts = [f"{match[1]}.{part}.{match[3]}" for part in joined]
            missing = [part for part in parts if part not in weights]
            if missing:
                raise CheckpointError(f"lacks weights: {missing[0]} (by our names).")
            result[f"{match[1]}.{joined}.{match[3]}"] = torch.cat([weights[part] for part in parts])
        return result

    return join


def _pvt_of_transformers(weights: Weights) -> Weights:
    return join_class_token(join_rows("kv")(weights))


LAYOUTS = (
    Layout("mmpretrain", "mixmim", (r"absolute_pos_embed$", r"^(backbone|neck)\."), MMPRETRAIN, reorder_merging),
    Layout("official", "mixmim", (r"^absolute_pos_embed$",)),
    Layout("timm", "swin", (r"^layers\.3\.downsample\.", r"\.attn\.relative_position_bias_table$"), TIMM_SWIN),
    Layout("official", "swin", (r"^layers\.0\.downsample\.", r"\.attn\.relative_position_bias_table$")),
    Layout(
        "transformers", "swin", (r"^(swin\.)?encoder\.layers\.", r"relative_position_bias_table$"), HF_SWIN,
        join_rows("qkv"),
    ),
    Layout("official", "pvt", (r"^patch_embed1\.", r"^pos_embed1$"), OFFICIAL_PVT, join_class_token),
    Layout(
        "transformers", "pvt", (r"^(pvt\.)?encoder\.patch_embeddings\.0\.position_embeddings$",),
        HF_PVT + OFFICIAL_PVT, _pvt_of_transformers,
    ),
)  # fmt: skip

# Networks that are often asked for, and why they are not there (docs/method.md).
UNSUPPORTED = (
    (r"\.dwconv\.", "a PVT v2, whose convolutions mix the two images of a mixture: it cannot be pretrained here"),
    (r"\.(logit_scale|cpb_mlp|continuous_position_bias_mlp)\b", "a Swin V2: only the first Swin is supported"),
)
