"""Architectures: the named sizes, the choice of windows, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mixmim_serve.config import (
    Architecture,
    DecoderConfig,
    Preprocessing,
    architecture,
    architecture_from_dict,
    size_name,
    size_names,
)
from mixmim_serve.description import Description
from mixmim_serve.errors import ConfigError


def test_default_windows_are_the_published_ones() -> None:
    assert architecture("base").windows == (14, 14, 14, 7)
    assert architecture("base-384").windows == (16, 16, 24, 12)


@pytest.mark.parametrize("size", range(32, 1025, 32))
def test_default_windows_divide_their_grids(size: int) -> None:
    arch = architecture("base").at(size)
    assert all(grid % window == 0 for grid, window in zip(arch.grids, arch.windows, strict=True))


@pytest.mark.parametrize("name", size_names())
def test_a_size_knows_its_name_and_survives_json(name: str) -> None:
    arch = architecture(name, num_classes=3)
    assert size_name(arch) == name
    assert architecture_from_dict(json.loads(json.dumps(dataclasses.asdict(arch)))) == arch


def test_a_size_at_another_input_says_so() -> None:
    assert size_name(architecture("base").at(320)) == "base@320"
    assert size_name(architecture("base").at(384)) == "base-384"
    assert size_name(Architecture(8, (1, 1, 1, 1), (1, 1, 1, 1), 64)) == "custom"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 100}, "not a multiple of 32: use 96"),
        ({"windows": (14, 14, 14, 5)}, "stage 4: a window of 5 does not divide its grid of 7"),
        ({"windows": (14, 14)}, "windows must be 4 positive numbers"),
        ({"heads": (3, 8, 16, 32)}, "stage 1: 128 channels cannot be split over 3 heads"),
        ({"depths": (2, 2, 0, 2)}, "depths must be 4 positive numbers"),
        ({"num_classes": -1}, "num_classes must be 0"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(architecture("base"), **changes)


def test_unknown_names_and_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean large"):
        architecture("larg")
    with pytest.raises(ConfigError, match="invalid architecture"):
        architecture_from_dict({"embed_dim": 8, "depth": 3})
    with pytest.raises(ConfigError, match="32 heads"):
        DecoderConfig(dim=100, heads=32)


def test_evaluation_preprocessing_is_the_official_rule() -> None:
    assert Preprocessing.evaluation(224).resize_size == 256
    assert Preprocessing.evaluation(128).resize_size == 146
    assert Preprocessing.evaluation(384).resize_size == 384
    with pytest.raises(ConfigError, match="smaller than the crop"):
        Preprocessing(image_size=224, resize_size=200)


def test_a_description_holds_together() -> None:
    arch = architecture("tiny", num_classes=2)
    description = Description(arch, Preprocessing.evaluation(128), ("cat", "dog"), {"made_by": "test"})
    assert Description.from_dict(json.loads(json.dumps(description.to_dict()))) == description
    with pytest.raises(ConfigError, match="1 labels for 2 classes"):
        dataclasses.replace(description, labels=("cat",))
    with pytest.raises(ConfigError, match="preprocessing produces 224 px"):
        dataclasses.replace(description, preprocessing=Preprocessing())
    with pytest.raises(ConfigError, match="incomplete"):
        Description.from_dict({"preprocessing": {}})
