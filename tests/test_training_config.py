"""Configurations, recipes and settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from training_data import SMALL

from mixmim_serve.config import architecture
from mixmim_serve.errors import ConfigError
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.service.settings import Settings
from mixmim_serve.settings import from_dict, override, parse_assignments
from training.config import AugmentConfig, FinetuneConfig, PretrainConfig
from training.recipes import FINETUNE, PRETRAIN, recipe


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1}, "a part of 1 images cannot be mixed in pairs"),
        ({"batch_size": 8, "accumulate": 8}, "a part of 1 images cannot be mixed in pairs"),
        ({"batch_size": 8, "accumulate": 3}, "a batch of 8 cannot be split into 3 equal parts"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
        ({"keep_every": -1}, "keep_every must be at least 1"),
        ({"sample_every": 0}, "sample_every must be at least 1"),
        ({"save_steps": -1}, "save_steps must be 0 or more"),
        ({"base_lr": -1.0}, "base_lr must be 0 or more"),
        ({"max_unreadable": 1.5}, "shares between 0 and 1"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"mask_ratio": 0.0}, "a share between 0 and 1"),
        ({"mask_ratio": 1.0}, "a share between 0 and 1"),
        ({"min_crop": 0.0}, "shares between 0 and 1"),
        ({"min_crop": 1.1}, "shares between 0 and 1"),
        ({"warmup_epochs": 2}, "warmup_epochs must be below the 2 epochs, got 2"),
        ({"warmup_epochs": -1}, "warmup_epochs must be below"),
        ({"size": "smal"}, "unknown size 'smal'"),
        ({"image_size": 100}, "not a multiple of 32: use 96"),
        ({"image_size": -32}, "image_size must be at least 1"),
        ({"image_size": 32}, "takes 0 of 1 units: enlarge image_size"),
        ({"mask_ratio": 0.2}, "takes 0 of 4 units"),
    ],
)
def test_impossible_configurations_are_refused_when_built(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_decay_rule": "swin"}, "unknown layer_decay_rule 'swin': choose one of official, mae, mmpretrain"),
        ({"layer_decay": 0.0}, "layer_decay and drop_path must be shares"),
        ({"drop_path": 1.0}, "layer_decay and drop_path must be shares"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
    ],
)
def test_impossible_fine_tuning_is_refused_when_built(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(FinetuneConfig(), **changes)


@pytest.mark.parametrize(
    "changes", [{"erase": 1.1}, {"smoothing": 1.0}, {"mixup": -0.1}, {"rand_augment_magnitude": 11}]
)
def test_impossible_augmentation_is_refused_when_built(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AugmentConfig(**changes)


# Recipes


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_recipes_build(name: str) -> None:
    config = recipe(name, PRETRAIN)
    assert config.size == "" or config.arch.decoder is not None  # empty: the network of the checkpoint in --from
    assert config.peak_lr == config.base_lr * config.batch_size / 256


@pytest.mark.parametrize("name", [*PRETRAIN, *FINETUNE])
def test_recipes_say_what_to_expect_and_whose_number_it_is(name: str) -> None:
    text = (PRETRAIN | FINETUNE)[name].__doc__ or ""
    for word in ("Command: ", f"--recipe {name}", "Hardware: ", "Time", "umber"):
        assert word in text, word
    assert "ours" in text or "theirs" in text


def test_the_defaults_are_the_official_recipes() -> None:
    config = recipe("base-600ep", PRETRAIN)
    assert config.arch == architecture("base")
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (600, 40, 2048)
    assert (config.betas, config.weight_decay, config.mask_ratio, config.min_crop) == ((0.9, 0.95), 0.05, 0.5, 0.2)
    tuning = recipe("base-finetune-100ep", FINETUNE)
    assert (tuning.epochs, tuning.warmup_epochs, tuning.batch_size, tuning.base_lr) == (100, 5, 1024, 5e-4)
    assert (tuning.layer_decay, tuning.layer_decay_rule, tuning.drop_path) == (0.7, "official", 0.1)
    assert (tuning.weight_decay, tuning.min_lr, tuning.head_std) == (0.05, 1e-6, 2e-5)
    augment = tuning.augment
    assert (augment.rand_augment_ops, augment.rand_augment_magnitude, augment.rand_augment_std) == (2, 9, 0.5)
    assert (augment.erase, augment.mixup, augment.cutmix, augment.smoothing) == (0.25, 0.8, 1.0, 0.1)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'tiny': choose one of base-600ep, tiny-cpu, tiny-continue-cpu\. Did"
    ):
        recipe("tiny", PRETRAIN)


# Settings


def test_settings_override_any_field() -> None:
    settings = ["epochs=7", "base_lr = 1", "bf16=no", "betas=0.8,0.99", "size=base", "image_size=224"]
    config = override(SMALL, settings)
    assert (config.epochs, config.base_lr, config.bf16, config.betas) == (7, 1.0, False, (0.8, 0.99))
    assert type(config.base_lr) is float
    assert config.arch == architecture("base")
    tuning = override(FinetuneConfig(), ["augment.mixup=0", "augment.rand_augment_ops=1", "layer_decay_rule=mae"])
    assert tuning.augment == AugmentConfig(mixup=0.0, rand_augment_ops=1)
    assert tuning.layer_decay_rule == "mae"
    assert [override(SMALL, [f"compile={value}"]).compile for value in ("auto", "no", "true")] == ["auto", False, True]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("epoch=7", "unknown setting 'epoch': did you mean epochs"),
        ("augment.mixp=0", r"unknown setting 'augment\.mixp': did you mean augment\.mixup"),
        ("zzzzz=1", "unknown setting 'zzzzz': did you mean accumulate or augment.cutmix"),
        ("epochs", "must be KEY=VALUE, got 'epochs'"),
        ("epochs=many", "epochs must be a whole number, got 'many'"),
        ("epochs=1.5", "epochs must be a whole number, got '1.5'"),
        ("epochs=True", "epochs must be a whole number, got 'True'"),
        ("base_lr=fast", "base_lr must be a number, got 'fast'"),
        ("base_lr=inf", "base_lr must be a number, got 'inf'"),
        ("betas=0.9", "betas must be 2 numbers"),
        ("bf16=maybe", "bf16 must be true or false"),
        ("epochs=0", "epochs must be at least 1"),
        ("compile=maybe", "compile must be true, false or auto, got 'maybe'"),
    ],
)
def test_wrong_settings_are_refused(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        override(FinetuneConfig(), [setting])


def test_settings_of_extraction_and_of_the_service_are_parsed_alike() -> None:
    job = override(ExtractJob(Path("tiny"), "photos", "out"), ["bundle=base", "options.features=stage1, stage4,"])
    assert (job.bundle, job.options.features) == (Path("base"), ("stage1", "stage4"))
    assert parse_assignments(Settings, ["cors=a,b", "jobs_roots="]) == {"cors": ("a", "b"), "jobs_roots": ()}
    with pytest.raises(ConfigError, match="unknown setting 'cors': did you mean "):
        parse_assignments(Settings, ["cors=a"], exclude=("cors",))


@pytest.mark.parametrize("config", [SMALL, FinetuneConfig(augment=AugmentConfig(mixup=0.1))])
def test_a_saved_configuration_is_read_again(config: PretrainConfig | FinetuneConfig) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(type(config), values) == config
    with pytest.raises(ConfigError, match="unknown setting 'speed' in a saved configuration"):
        from_dict(type(config), values | {"speed": 1})
