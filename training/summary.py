"""The settings of a run that matter to most people, for the terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

from training.config import AUTO, DistillConfig, FinetuneConfig, PretrainConfig, RunConfig

# Fields that a row of the summary holds already.
_SHOWN = {"size", "image_size", "epochs", "warmup_epochs", "batch_size", "accumulate", "base_lr", "weight_decay"}
_SHOWN |= {"bf16", "compile", "workers", "seed", "min_crop", "mask_ratio", "layer_decay", "drop_path"}
_SHOWN |= {"match_embedding", "match_stages", "mixmim_weight"}
COMPILE = {True: "compiled", False: "not compiled", AUTO: "compiled once that pays"}


def summary(config: RunConfig, recipe: RunConfig) -> list[tuple[str, str]]:
    """Names and values; the last row has what else differs from the recipe."""
    rows = [
        ("network", _network(config)),
        ("epochs", f"{config.epochs}, with {config.warmup_epochs:g} of warm-up"),
        ("batch", f"{config.batch_size} images" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")),
        ("learning rate", f"{config.peak_lr:g} at most, weight decay {config.weight_decay:g}"),
        *_objective(config),
        (
            "compute",
            ", ".join(("bf16" if config.bf16 else "float32", COMPILE[config.compile])),
        ),
        ("decoding", f"{config.workers or 'no'} processes of its own, seed {config.seed}"),
    ]
    if changed := _changed(dataclasses.asdict(config), dataclasses.asdict(recipe)):
        rows.append(("also changed", ", ".join(changed)))
    return rows


def _network(config: RunConfig) -> str:
    size = config.size or "the checkpoint's"
    pixels = config.arch.image_size if isinstance(config, PretrainConfig) and config.size else config.image_size
    return f"{size} at {pixels} px" if pixels else f"{size} at the checkpoint's input size"


def _objective(config: RunConfig) -> list[tuple[str, str]]:
    crops = f"crops of {config.min_crop:.0%} of an image or more"
    if isinstance(config, DistillConfig):
        parts = {
            "embedding": config.match_embedding,
            "stages 3 and 4": config.match_stages,
            f"MixMIM with {config.mask_ratio:.0%} mixed in": config.mixmim_weight,
        }
        matched = ", ".join(f"{name} (weight {weight:g})" for name, weight in parts.items() if weight)
        return [("images", crops), ("learns", matched)]
    if isinstance(config, PretrainConfig):
        return [("images", f"{crops}, {config.mask_ratio:.0%} mixed in")]
    if isinstance(config, FinetuneConfig):
        augment = config.augment
        switched = {
            f"RandAugment {augment.rand_augment_ops}": augment.rand_augment_ops,
            f"erase {augment.erase:g}": augment.erase,
            f"mixup {augment.mixup:g}": augment.mixup,
            f"cutmix {augment.cutmix:g}": augment.cutmix,
            f"label smoothing {augment.smoothing:g}": augment.smoothing,
        }
        return [
            ("images", ", ".join([crops, *(name for name, on in switched.items() if on)])),
            ("layers", f"rate times {config.layer_decay:g} per layer, drop path {config.drop_path:g}"),
        ]
    return []


def _changed(config: dict[str, Any], recipe: dict[str, Any], prefix: str = "") -> list[str]:
    """`key=value` of the settings that no row shows and that are not the recipe's."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _changed(value, recipe[name], f"{name}.")
        elif value != recipe[name] and name not in _SHOWN:
            found.append(f"{prefix}{name}={value}")
    return found
