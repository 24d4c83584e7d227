"""Named pretraining runs: each a function that returns a whole config."""

from __future__ import annotations

from collections.abc import Callable

from mixmim_serve.errors import ConfigError
from training.config import PretrainConfig


def base_600ep() -> PretrainConfig:
    """Base at 224 px on ImageNet-1K, the official recipe (official README: 85.1 % top-1 after fine-tuning, theirs).

    Command: mixmim pretrain imagenet/train --recipe base-600ep --out runs/base
    Hardware: the batch of 2048 needs several GPUs; this version trains on one device. Never run by us.
    """
    return PretrainConfig()


def tiny_cpu() -> PretrainConfig:
    """Tiny at 128 px on some thousands of photos, on two CPU cores in one to two hours.

    Command: mixmim pretrain photos --recipe tiny-cpu --out runs/tiny
    Batch and learning rate are ours (a small batch makes more steps of few images); the rest is the official recipe.
    Measured result: docs/shipped-model.md.
    """
    return PretrainConfig(
        size="tiny",
        epochs=25,
        warmup_epochs=3,
        batch_size=128,
        base_lr=2e-3,
        workers=1,
        checkpoint_every=5,
        compile=True,
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {"base-600ep": base_600ep, "tiny-cpu": tiny_cpu}


def recipe(name: str) -> PretrainConfig:
    """The named recipe.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]()
