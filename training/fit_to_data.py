"""Batch, epochs and augmentation that follow the number of images, where the user chose none of them.

A recipe is written for thousands of photos. For fewer:

    batch          the recipe's, halved until an epoch has `STEPS_PER_EPOCH` steps, but not below `SMALLEST_BATCH`
    rate           of a smaller batch: falls with its square root, as AdamW's does (arXiv 2205.10287), not linearly
    epochs         the recipe's, or as many as it takes to make `STEPS` steps; warm-up and intervals keep their share
    augmentation   below `FEW_LABELLED` labelled images, light augmentation where the recipe has none

Each change is one line with its reason. The resolved values are part of the run's config.json, from which `--resume`
takes them again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.settings import from_dict
from mixmim_serve.strict_json import read_json
from training.config import AugmentConfig, FinetuneConfig, RunConfig

Config = TypeVar("Config", bound=RunConfig)

FEWEST = 8  # images to train on: one batch of the smallest size
SMALLEST_BATCH = 8  # images; below, the gradient of one update is mostly noise
STEPS_PER_EPOCH = 8
STEPS = {"pretrain": 1000, "finetune": 400}  # of a whole run; tiny-cpu makes 1,950 with the 10,022 photos of its number
FEW_LABELLED = 1000  # images
LIGHT = AugmentConfig(rand_augment_ops=1, rand_augment_magnitude=5.0, erase=0.1, mixup=0.1, cutmix=0.0)
INTERVALS = ("sample_every", "knn_every", "evaluate_every", "keep_every")  # epochs between two of something
FITTED = ("batch_size", "base_lr", "epochs", "warmup_epochs", "augment", *INTERVALS)


def too_few(name: str, images: int) -> DataError:
    """The error for a source of fewer than `FEWEST` images."""
    counted = f"{images} image" if images == 1 else f"{images} images"
    return DataError(f"{name} holds {counted}, too few to train on: add some, at least {FEWEST} are needed.")


def fit(
    config: Config, source: str, images: int, given: Collection[str] = (), processes: int = 1
) -> tuple[Config, tuple[str, ...]]:
    """The configuration for so many images, and a line for each change; fields in `given` stay as they are.

    Raises:
        DataError: fewer than `FEWEST` images, unless the user gave a batch size.
    """
    if images < FEWEST and "batch_size" not in given:
        raise too_few(source, images)
    lines: list[str] = []
    if "batch_size" not in given:
        before = config.batch_size
        config, line = _with_fitting_batch(config, images, processes)
        lines += line
        if "base_lr" not in given and config.batch_size < before:
            config, line = _with_fitting_rate(config, before)
            lines += line
    if "epochs" not in given and config.batch_size <= images:
        config, line = _with_enough_epochs(config, images, given)
        lines += line
    if isinstance(config, FinetuneConfig) and not any(name.startswith("augment.") for name in given):
        augment, line = _augmentation(config.augment, images)
        config = dataclasses.replace(config, augment=augment)
        lines += line
    return config, tuple(lines)


def resumed(config: Config, run: Path, given: Collection[str]) -> Config:
    """The configuration with the values of `FITTED` that the run in `run` was started with; `given` fields stay.

    A folder without a config.json that this version reads changes nothing: `RunFolder.check` refuses it.
    """
    try:
        saved = from_dict(type(config), read_json(run / "config.json")["config"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return config
    names = [name for name in FITTED if name not in given and hasattr(config, name)]
    names = [name for name in names if name != "augment" or not any(key.startswith("augment.") for key in given)]
    return dataclasses.replace(config, **{name: getattr(saved, name) for name in names})


def _with_fitting_batch(config: Config, images: int, processes: int) -> tuple[Config, list[str]]:
    old, steps = config.batch_size, images // config.batch_size
    if steps >= STEPS_PER_EPOCH:
        return config, []
    # Each part of a batch is mixed in pairs, so it has an even number of images.
    part = 2 * config.accumulate * processes
    sizes = [old >> power for power in range(old.bit_length())]
    sizes = [size for size in sizes if size >= SMALLEST_BATCH and size % part == 0]
    if not sizes:
        return config, []
    batch = next((size for size in sizes if images // size >= STEPS_PER_EPOCH), sizes[-1])
    if batch == old:
        return config, []
    reason = f"{images} images would give {_steps(steps)} per epoch" if steps else f"there are only {images} images"
    return dataclasses.replace(config, batch_size=batch), [f"batch {batch} instead of {old}: {reason}"]


def _with_fitting_rate(config: Config, before: int) -> tuple[Config, list[str]]:
    """`base_lr` is multiplied with the batch; this takes half of that back."""
    rate = float(f"{config.base_lr * math.sqrt(before / config.batch_size):.2g}")
    line = f"base_lr {rate:g} instead of {config.base_lr:g}: so the rate falls with the root of the batch, as for AdamW"
    return dataclasses.replace(config, base_lr=rate), [line]


def _with_enough_epochs(config: Config, images: int, given: Collection[str]) -> tuple[Config, list[str]]:
    kind = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    per_epoch, old, enough = images // config.batch_size, config.epochs, STEPS[kind]
    if per_epoch * old >= enough:
        return config, []
    epochs = math.ceil(enough / per_epoch)
    changes: dict[str, Any] = {"epochs": epochs}
    if "warmup_epochs" not in given:
        changes["warmup_epochs"] = config.warmup_epochs * epochs / old
    line = f"epochs {epochs} instead of {old}: {_steps(per_epoch)} each would end after {per_epoch * old}, it takes "
    lines = [f"{line}about {enough:,} to learn something"]
    intervals = [name for name in INTERVALS if name not in given and 1 < getattr(config, name, 0) <= old]
    for name in intervals:
        changes[name] = round(getattr(config, name) * epochs / old)
    if intervals:
        listed = ", ".join(f"{name} {changes[name]}" for name in intervals)
        lines.append(f"{listed}: as often in {epochs} epochs as in {old}")
    return dataclasses.replace(config, **changes), lines


def _augmentation(augment: AugmentConfig, images: int) -> tuple[AugmentConfig, list[str]]:
    is_off = not (augment.rand_augment_ops or augment.erase or augment.mixup or augment.cutmix)
    if images >= FEW_LABELLED or not is_off:
        return augment, []
    light = dataclasses.replace(LIGHT, smoothing=augment.smoothing)
    line = (
        f"augmentation rand_augment_ops {light.rand_augment_ops} of magnitude {light.rand_augment_magnitude:g}, erase "
        f"{light.erase:g}, mixup {light.mixup:g} instead of none: {images} images are soon learnt by heart"
    )
    return light, [line]


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def given_fields(options: Mapping[str, object], settings: Collection[str]) -> frozenset[str]:
    """The fields that the user set: by an option that is not None, or by `--set KEY=VALUE`."""
    named = {name for name, value in options.items() if value is not None}
    return frozenset(named | {setting.partition("=")[0].strip() for setting in settings})
