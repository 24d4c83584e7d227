"""AdamW's parameter groups and the learning-rate schedule of the official pretraining code."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.config import PretrainConfig


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on every tensor of more than one dimension, bias tables and mask token included."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


def learning_rate(epoch: float, config: PretrainConfig) -> float:
    """Linear warm-up, then half a cosine; `epoch` is fractional (the official schedule moves every step)."""
    if epoch < config.warmup_epochs:
        return config.peak_lr * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
