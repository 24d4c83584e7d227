"""Named runs: functions that return a complete configuration; docstrings give the expected result and its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mixmim_serve.config import unknown
from training.config import AugmentConfig, DistillConfig, FinetuneConfig, PretrainConfig

Config = TypeVar("Config")

_TINY_CPU: dict[str, Any] = {  # of tiny-cpu and tiny-distill-cpu, so that the two differ in what is learned alone
    "epochs": 25,
    "warmup_epochs": 3,
    "batch_size": 128,
    "base_lr": 2e-3,
    "workers": 1,
    "keep_every": 5,
    "compile": "auto",
}


def base_600ep() -> PretrainConfig:
    """Pretrain base at 224 px on ImageNet-1K: the official recipe.

    Command: torchrun --nproc-per-node 8 --no-python mixmim pretrain imagenet/train --recipe base-600ep --out runs/base
    Hardware: made for a batch of 2048, 256 images on each of 8 GPUs; `--set accumulate=N` fits it on fewer.
    Time: not measured by us.
    Number: 85.1 % top-1 on ImageNet-1K after base-finetune-100ep (official README: theirs, not reproduced by us).
    """
    return PretrainConfig(compile=True)


def tiny_cpu() -> PretrainConfig:
    """Pretrain tiny at 128 px on some thousands of photos, on a CPU.

    Command: mixmim pretrain photos --recipe tiny-cpu --out runs/tiny
    Hardware: two CPU cores. Time: 59 minutes for 10,022 photos.
    Number: 51.0 % k-NN (k = 10) on clothing10 val, untrained 30.5 % (ours: docs/shipped-model.md).
    Batch and learning rate are ours (a small batch gives more steps with few images); the rest is the official recipe.
    """
    return PretrainConfig(size="tiny", **_TINY_CPU)


def tiny_continue_cpu() -> PretrainConfig:
    """Go on pretraining a model, such as the shipped one, on your own photos, on a CPU.

    Command: mixmim pretrain photos --from tiny --recipe tiny-continue-cpu --out runs/mine
    Hardware: two CPU cores. Time and number: not measured by us; the rate, a quarter of tiny-cpu's, is ours.
    Size and input size are the checkpoint's. A lower rate, one epoch of warm-up and fewer epochs than tiny-cpu has: the
    weights are good already, and a full rate would undo them before it improves them.
    """
    return dataclasses.replace(tiny_cpu(), size="", epochs=10, warmup_epochs=1, base_lr=5e-4)


def tiny_distill_cpu() -> DistillConfig:
    """Distil a larger model into tiny at 128 px, on some thousands of photos without labels, on a CPU.

    Command: mixmim distill photos --teacher runs/large --recipe tiny-distill-cpu --out runs/small
    Hardware: two CPU cores. Time and number: not measured by us; `python -m benchmarks.distill` measures both against
        tiny-cpu at an equal budget.
    Epochs, batch, rate and crops are those of tiny-cpu (ours), so that the two differ in what is learned alone.
    """
    return DistillConfig(**_TINY_CPU)


def base_finetune_100ep() -> FinetuneConfig:
    """Fine-tune base on ImageNet-1K: the official recipe.

    Command: torchrun --nproc-per-node 8 --no-python mixmim finetune imagenet --from runs/base/final.safetensors
        --recipe base-finetune-100ep --out runs/base-finetuned
    Hardware: made for a batch of 1024 on 8 GPUs. Time: not measured by us.
    Number: 85.1 % top-1 (official README: theirs, not reproduced by us).
    """
    return FinetuneConfig(compile=True)


def tiny_finetune_cpu() -> FinetuneConfig:
    """Fine-tune tiny on some thousands of labelled photos, on a CPU.

    Command: mixmim finetune clothing10 --from tiny --recipe tiny-finetune-cpu --out runs/clothing
    Hardware: two CPU cores. Time and number: docs/results.md (ours).
    Unlike the official recipe: batch, learning rate and layer decay for few images; only crops and flips, and a lower
    drop path, since a small network underfits in a few tens of epochs. For longer runs set the official augmentation,
    `--set augment.rand_augment_ops=2 --set augment.mixup=0.8 --set augment.cutmix=1 --set augment.erase=0.25`.
    """
    return FinetuneConfig(
        epochs=20,
        warmup_epochs=2,
        batch_size=64,
        base_lr=4e-3,
        layer_decay=0.85,
        min_crop=0.25,
        drop_path=0.05,
        augment=AugmentConfig(rand_augment_ops=0, erase=0.0, mixup=0.0, cutmix=0.0),
        workers=1,
        evaluate_every=5,
        keep_every=1000,
        compile="auto",
    )


PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "base-600ep": base_600ep,
    "tiny-cpu": tiny_cpu,
    "tiny-continue-cpu": tiny_continue_cpu,
}
DISTILL: dict[str, Callable[[], DistillConfig]] = {"tiny-distill-cpu": tiny_distill_cpu}
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {
    "base-finetune-100ep": base_finetune_100ep,
    "tiny-finetune-cpu": tiny_finetune_cpu,
}


def recipe(name: str, recipes: dict[str, Callable[[], Config]]) -> Config:
    """The named recipe.

    Raises:
        ConfigError: for an unknown name, listing the available ones.
    """
    if name not in recipes:
        raise unknown("recipe", name, recipes)
    return recipes[name]()
