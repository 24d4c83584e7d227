"""Schedule, parameter groups and layer decay against the official ones."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch
from conftest import GOLDEN

from mixmim_serve.config import architecture
from mixmim_serve.model import Encoder, MixMIM
from training.config import FinetuneConfig, PretrainConfig
from training.optim import build_optimizer, layer_scale, learning_rate, parameter_groups

SMALL = PretrainConfig(size="tiny", epochs=2, warmup_epochs=0.5, batch_size=8, base_lr=3.2e-2)


def test_learning_rate_is_the_official_schedule() -> None:
    official = json.loads((GOLDEN / "official_lr_schedule.json").read_text())
    config = PretrainConfig()
    assert (config.epochs, config.warmup_epochs) == (official["epochs"], official["warmup_epochs"])
    assert config.peak_lr == pytest.approx(official["lr"], rel=1e-12)
    for epoch, lr in official["lr_at_epoch"].items():
        assert learning_rate(float(epoch), config) == pytest.approx(lr, rel=1e-6, abs=1e-18), epoch


def test_learning_rate_ends_at_its_minimum_and_may_have_no_warm_up() -> None:
    config = dataclasses.replace(SMALL, warmup_epochs=0, min_lr=1e-5)
    assert learning_rate(0, config) == pytest.approx(config.peak_lr)
    assert learning_rate(1, config) == pytest.approx((config.peak_lr + 1e-5) / 2)
    assert learning_rate(2, config) == pytest.approx(1e-5)


def by_name(model: torch.nn.Module, groups: list[dict[str, object]], value: str) -> dict[str, float]:
    """A group's value by parameter; every parameter must be in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [(names[id(parameter)], group[value]) for group in groups for parameter in group["params"]]
    assert Counter(name for name, _ in grouped) == Counter(names.values())
    return dict(grouped)


@pytest.fixture(scope="module")
def base() -> MixMIM:
    """The base network on the meta device."""
    with torch.device("meta"):
        return MixMIM(architecture("base"))


def test_every_tensor_of_more_than_one_dimension_is_decayed(base: MixMIM) -> None:
    groups = parameter_groups(base, 0.05)
    assert len(groups) == 2
    assert {group["lr_scale"] for group in groups} == {1.0}
    decays = by_name(base, groups, "weight_decay")
    for name, parameter in base.named_parameters():
        assert decays[name] == (0.05 if parameter.dim() > 1 else 0.0), name
    for name in ("mask_token", "layers.0.blocks.0.attn.relative_position_bias_table", "decoder_pred.weight"):
        assert decays[name] == 0.05
    for name in ("norm.weight", "patch_embed.proj.bias", "decoder_blocks.7.norm2.weight"):
        assert decays[name] == 0.0


@pytest.mark.parametrize("size", ["base", "large"])
def test_layer_decay_is_the_official_one(size: str) -> None:
    official = json.loads((GOLDEN / f"official_layer_decay_{size}.json").read_text())
    arch = architecture(size, num_classes=1000, with_decoder=False)
    with torch.device("meta"):
        model = Encoder(arch)
    config = FinetuneConfig()
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, "official", arch.depths)
    scales, decays = by_name(model, groups, "lr_scale"), by_name(model, groups, "weight_decay")
    assert scales.keys() == official.keys()
    for name, expected in official.items():
        assert scales[name] == pytest.approx(expected["lr_scale"], rel=1e-12), name
        assert decays[name] == expected["weight_decay"], name
    assert len(groups) == 2 * (sum(arch.depths) + 1)  # patch embedding and every block, decayed or not


@pytest.mark.parametrize(
    ("name", "official", "mae", "mmpretrain"),
    [
        ("patch_embed.proj.weight", 25, 25, 25),
        ("layers.0.blocks.0.norm1.weight", 24, 24, 24),
        ("layers.0.blocks.1.mlp.fc1.bias", 23, 23, 23),
        ("layers.0.downsample.reduction.weight", 22, 22, 23),
        ("layers.2.downsample.norm.bias", 2, 2, 3),
        ("layers.3.blocks.1.attn.qkv.weight", 1, 1, 1),
        ("norm.weight", 1, 0, 1),
        ("head.weight", 1, 0, 0),
    ],
)
def test_the_three_rules_of_layer_decay(name: str, official: int, mae: int, mmpretrain: int) -> None:
    """Powers of the decay for base."""
    for rule, power in (("official", official), ("mae", mae), ("mmpretrain", mmpretrain)):
        assert layer_scale(name, (2, 2, 18, 2), 0.7, rule) == pytest.approx(0.7**power), rule


def test_the_optimizer_has_the_recipes_settings() -> None:
    config = dataclasses.replace(SMALL, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = build_optimizer(parameter_groups(torch.nn.Linear(2, 2), config.weight_decay), config)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(1e-3), (0.8, 0.9), decay)
        assert group["fused"]
