"""Batch, epochs and augmentation follow the number of images; what the user set does not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from pictures import photo
from typer.testing import CliRunner, Result

import training.recipes
from mixmim_serve.cli import app
from mixmim_serve.errors import ConfigError, DataError
from training.config import AugmentConfig, FinetuneConfig, PretrainConfig
from training.data import StepSampler
from training.fit_to_data import FEWEST, LIGHT, STEPS, STEPS_PER_EPOCH, fit, given_fields, resumed
from training.recipes import base_600ep, tiny_cpu, tiny_finetune_cpu
from training.run_folder import as_json
from training.sufficiency import CONTINUED, FROM_SCRATCH, PER_CLASS, PROBED, uses

EPOCHS = -(-STEPS["pretrain"] // 12)  # of twelve steps each


def test_200_images_are_not_one_step_per_epoch() -> None:
    config, lines = fit(tiny_cpu(), "photos", 200)
    assert (config.batch_size, config.epochs) == (16, EPOCHS)
    assert config.warmup_epochs == pytest.approx(tiny_cpu().warmup_epochs * EPOCHS / 25)
    assert lines == (
        "batch 16 instead of 128: 200 images would give 1 step per epoch",
        "base_lr 0.0057 instead of 0.002: so the rate falls with the root of the batch, as for AdamW",
        f"epochs {EPOCHS} instead of 25: 12 steps each would end after 300, it takes about 1,000 to learn something",
        f"sample_every 17, knn_every 17, keep_every 17: as often in {EPOCHS} epochs as in 25",
    )


@pytest.mark.parametrize("images", [FEWEST, 9, 50, 99, 200, 1000, 3068, 10_022, 2_000_000])
@pytest.mark.parametrize("recipe", [tiny_cpu, base_600ep, tiny_finetune_cpu])
def test_any_number_of_images_gives_enough_steps_of_even_batches(recipe: object, images: int) -> None:
    assert callable(recipe)
    before = recipe()
    after, lines = fit(before, "photos", images)
    per_epoch = images // after.batch_size
    kind = "finetune" if isinstance(before, FinetuneConfig) else "pretrain"
    assert after.batch_size % 2 == 0
    assert per_epoch * after.epochs >= STEPS[kind]
    assert per_epoch >= STEPS_PER_EPOCH or after.batch_size == FEWEST
    assert (after == before) == (lines == ())


def test_a_recipe_that_fits_stays_as_it_is() -> None:
    assert fit(tiny_cpu(), "photos", 10_022) == (tiny_cpu(), ())
    assert fit(base_600ep(), "photos", 1_281_167) == (base_600ep(), ())


def test_what_the_user_set_is_never_changed() -> None:
    given = {"batch_size", "epochs", "warmup_epochs", "augment.mixup"}
    assert fit(tiny_finetune_cpu(), "photos", 200, given) == (tiny_finetune_cpu(), ())
    config, lines = fit(tiny_cpu(), "photos", 200, {"batch_size"})
    assert (config.batch_size, config.epochs) == (128, STEPS["pretrain"])  # of one step each
    assert not any(line.startswith("batch") for line in lines)
    config, _ = fit(tiny_cpu(), "photos", 200, {"epochs", "knn_every"})
    assert (config.batch_size, config.epochs, config.knn_every) == (16, 25, 5)
    assert config.peak_lr == pytest.approx(tiny_cpu().peak_lr / math.sqrt(8), rel=0.01)
    config, _ = fit(tiny_cpu(), "photos", 200, {"base_lr"})
    assert (config.batch_size, config.base_lr) == (16, tiny_cpu().base_lr)
    config, _ = fit(tiny_cpu(), "photos", 200, {"warmup_epochs", "keep_every"})
    assert (config.warmup_epochs, config.keep_every) == (3, 5)


def test_the_fields_that_a_user_set() -> None:
    options = {"batch_size": None, "epochs": 3, "workers": 0}
    assert given_fields(options, ["augment.mixup=0", "keep_last = 1"]) == {
        "epochs", "workers", "augment.mixup", "keep_last",
    }  # fmt: skip


@pytest.mark.parametrize(("processes", "accumulate", "batch"), [(1, 1, 16), (4, 1, 16), (4, 4, 32), (64, 1, 128)])
def test_a_batch_can_be_split_over_processes_and_parts(processes: int, accumulate: int, batch: int) -> None:
    config, _ = fit(dataclasses.replace(tiny_cpu(), accumulate=accumulate), "photos", 200, (), processes)
    assert config.batch_size == batch
    assert config.part_size(processes) % 2 == 0


def test_few_labelled_images_are_augmented_where_the_recipe_does_not() -> None:
    config, lines = fit(tiny_finetune_cpu(), "photos", 50)
    assert config.augment == dataclasses.replace(LIGHT, smoothing=tiny_finetune_cpu().augment.smoothing)
    assert lines[-1].endswith("instead of none: 50 images are soon learnt by heart")
    assert fit(tiny_finetune_cpu(), "photos", 5000)[0].augment == tiny_finetune_cpu().augment
    assert fit(FinetuneConfig(), "photos", 50)[0].augment == AugmentConfig()  # the official recipe has more


def test_a_resumed_run_keeps_its_own_values(tmp_path: Path) -> None:
    """Also those of an older version, whose rules were others, or that had none."""
    started = dataclasses.replace(tiny_cpu(), batch_size=32, epochs=7, warmup_epochs=1.5, keep_every=2)
    (tmp_path / "config.json").write_text(as_json(started, {}))
    assert resumed(tiny_cpu(), tmp_path, ()) == started
    assert resumed(dataclasses.replace(tiny_cpu(), epochs=9), tmp_path, {"epochs"}).epochs == 9
    tuned = fit(tiny_finetune_cpu(), "photos", 50)[0]
    (tmp_path / "config.json").write_text(as_json(tuned, {}))
    assert resumed(tiny_finetune_cpu(), tmp_path, ()) == tuned
    (tmp_path / "config.json").write_text("{")
    assert resumed(tiny_cpu(), tmp_path, ()) == tiny_cpu()  # RunFolder.check says that it is damaged


def test_the_uses_of_a_data_set() -> None:
    def enough(images: int, classes: dict[str, int] | None = None) -> list[bool]:
        return [use.enough for use in uses(images, classes)]

    assert enough(FROM_SCRATCH) == [True, True, False, False]
    assert enough(CONTINUED, {"a": PER_CLASS, "b": 90}) == [False, True, True, True]
    assert enough(50, {"a": PROBED, "b": 45}) == [False, False, False, True]
    assert enough(50, {"a": 50}) == [False] * 4
    assert enough(3, {"a": 1, "b": 2}) == [False] * 4
    assert all(use.reason for use in uses(3, None))


# The commands


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes at 64 px and without torch.compile, which takes a minute."""
    small = {"compile": False, "image_size": 64, "workers": 0, "bf16": False}
    for name, recipes in (("tiny-cpu", training.recipes.PRETRAIN), ("tiny-finetune-cpu", training.recipes.FINETUNE)):
        recipe = dataclasses.replace(recipes[name](), **small)  # type: ignore[operator]
        monkeypatch.setitem(recipes, name, lambda recipe=recipe: recipe)
    monkeypatch.setitem(STEPS, "pretrain", 4)
    monkeypatch.setitem(STEPS, "finetune", 4)


def mixmim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        photo(number).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.usefixtures("quick")
def test_three_photos_are_refused_by_check_and_pretrain_in_the_same_words(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    checked, pretrained = mixmim("check", photos), mixmim("pretrain", photos, "--out", tmp_path / "run")
    assert isinstance(checked.exception, DataError)
    assert str(checked.exception) == str(pretrained.exception)
    assert "holds 3 images, too few to train on" in str(checked.exception)
    assert "no problems found" not in checked.stdout
    assert json.loads(mixmim("check", photos, "--json").stdout)["refusal"] == str(checked.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick")
def test_pretrain_follows_the_data_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos", 20)
    command = ("pretrain", photos, "--out", tmp_path / "run", "--epochs", 1)
    result = mixmim(*command)
    assert result.exit_code == 0, result.output
    assert "batch 8 instead of 128: there are only 20 images" in result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["batch_size"], config["epochs"]) == (8, 1)
    (tmp_path / "run" / "final.safetensors").unlink()
    monkeypatch.setattr(training.fit_to_data, "SMALLEST_BATCH", 16)  # a later version has another rule
    result = mixmim(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert "instead of" not in result.stderr
    (tmp_path / "run" / "final.safetensors").unlink()
    refused = mixmim(*command, "--resume", "--batch-size", 4).exception
    assert isinstance(refused, ConfigError)
    assert "batch_size 8 (now 4)" in str(refused)


@pytest.mark.usefixtures("quick")
def test_50_labelled_photos_are_fine_tuned(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_photos(tmp_path / "photos" / name, 25)
    result = mixmim("finetune", tmp_path / "photos", "--from", "scratch", "--set", "size=tiny", "--epochs", 1,
                    "--out", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "batch 8 instead of 64: there are only 50 images" in result.stderr
    assert "augmentation rand_augment_ops" in result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["batch_size"] == 8
    assert config["augment"]["mixup"] == LIGHT.mixup


@pytest.mark.usefixtures("quick")
def test_a_batch_that_the_user_set_too_large_is_refused_in_one_sentence(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 20)
    error = mixmim("pretrain", photos, "--out", tmp_path / "run", "--batch-size", 64).exception
    assert isinstance(error, DataError)
    assert "holds 20 images, fewer than a batch of 64" in str(error)


def test_the_last_batch_sizes_are_what_the_loader_takes() -> None:
    class Images:
        runs = (range(FEWEST),)
        keys = tuple(map(str, range(FEWEST)))

    config, _ = fit(PretrainConfig(size="tiny", epochs=60), "photos", FEWEST)
    assert StepSampler(Images(), config).steps == 1  # type: ignore[arg-type]
