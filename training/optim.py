"""AdamW's parameter groups and the learning-rate schedule of the official code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.config import RunConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, rule: str = "official", depths: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """One group per pair of learning-rate scale and weight decay.

    Every tensor of more than one dimension is decayed, bias tables and mask token included. `lr_scale` is 1 without
    layer decay; otherwise it falls by that factor from each layer to the one below (`layer_scale`).
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_scale(name, depths, layer_decay, rule) if layer_decay != 1 else 1.0
        decay = weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def layer_scale(name: str, depths: Sequence[int], decay: float, rule: str) -> float:
    """Share of the learning rate for a classifier's parameter: lowest for the patch embedding, highest at the end.

    `official` (util/lr_decay.py) assigns the final norm and the head to the last block, and a downsampling layer to the
    next stage's first block. `mae` gives norm and head the full rate (the layer after the last block). `mmpretrain`
    gives only the head the full rate, and assigns downsampling to its own stage's last block. Position embedding and
    class token of a stage belong to its first block.
    """
    blocks = sum(depths)
    match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)\.|(downsample)\.)?", name)
    if match and match[3]:
        layer = sum(depths[: int(match[1]) + 1]) + (rule != "mmpretrain")
    elif match:
        layer = sum(depths[: int(match[1])]) + int(match[2] or 0) + 1
    elif name.startswith("patch_embed."):
        layer = 0
    elif rule == "mae" or (rule == "mmpretrain" and name.startswith("head.")):
        layer = blocks + 1
    else:
        layer = blocks
    return float(decay ** (blocks + 1 - layer))


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.AdamW:
    """Fused AdamW over `groups`."""
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


def learning_rate(epoch: float, config: RunConfig) -> float:
    """Linear warm-up, then half a cosine; `epoch` is fractional (the official schedule changes at every step)."""
    if epoch < config.warmup_epochs:
        return config.peak_lr * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
