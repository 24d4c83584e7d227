"""Pretraining: schedule and parameter groups against the official ones, the data path, and whole small runs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import training.recipes
from mixmim_serve.cli import app
from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint
from mixmim_serve.preprocess import normalize
from training.augment import ASPECT_RATIOS, crop_and_flip, random_crop_box
from training.config import PretrainConfig
from training.data import Batch, EpochSampler, PretrainingImages, build_loader, collate
from training.optim import build_optimizer, learning_rate
from training.recipes import RECIPES, recipe, tiny_cpu
from training.trainer import Trainer, pretrain

# Two epochs of three steps; the peak learning rate is 1e-3.
SMALL = PretrainConfig(
    size="tiny",
    image_size=64,
    epochs=2,
    warmup_epochs=0.5,
    batch_size=8,
    base_lr=3.2e-2,
    workers=0,
    log_every=1,
    checkpoint_every=1,
    bf16=False,
)
STEPS_PER_EPOCH = 3


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Soft coloured clouds: smooth, like photos, so that there is something to learn."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos in one folder: no labels, no sub-folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        photo(number).save(folder / f"{number:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def spoilt(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 of the photos at two depths, a text with an image's name, a photo cut in half, and what is no image."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "holiday" / "2026").mkdir(parents=True)
    for number, path in enumerate(sorted(photos.iterdir())[:22]):
        (folder / ("holiday/2026" if number % 2 else "") / path.name).write_bytes(path.read_bytes())
    (folder / "letter.jpg").write_text("Dear all, no image here.")
    whole = (photos / "23.jpg").read_bytes()
    (folder / "holiday" / "cut.jpeg").write_bytes(whole[: len(whole) // 2])
    (folder / "labels.csv").write_text("00.jpg,1\n")
    (folder / ".hidden.jpg").write_text("of the file manager")
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run and what it printed."""

    path: Path
    final: Path
    printed: str

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]


def run_pretraining(config: PretrainConfig, images: Path, path: Path) -> Run:
    console = Console(file=io.StringIO(), width=200)
    final = pretrain(config, images, path, console)
    assert isinstance(console.file, io.StringIO)
    return Run(path, final, console.file.getvalue())


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs over the photos."""
    return run_pretraining(SMALL, photos, tmp_path_factory.mktemp("run") / "new" / "run")


def first_batch(images: Path, config: PretrainConfig = SMALL) -> Batch:
    batch: Batch = next(iter(build_loader(images, config.arch.image_size, config)[0]))
    return batch


# The schedule and the parameter groups


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


def decay_by_name(model: torch.nn.Module, config: PretrainConfig) -> dict[str, float]:
    """Weight decay of each parameter, each of which must stand in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    grouped = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert Counter(name for name, _ in grouped) == Counter(names.values())
    return dict(grouped)


@pytest.fixture(scope="module")
def base() -> MixMIM:
    """The base network without values."""
    with torch.device("meta"):
        return MixMIM(architecture("base"))


def test_every_tensor_of_more_than_one_dimension_is_decayed(base: MixMIM) -> None:
    decays = decay_by_name(base, PretrainConfig())
    for name, parameter in base.named_parameters():
        assert decays[name] == (0.05 if parameter.dim() > 1 else 0.0), name
    for name in ("mask_token", "layers.0.blocks.0.attn.relative_position_bias_table", "decoder_pred.weight"):
        assert decays[name] == 0.05
    for name in ("norm.weight", "patch_embed.proj.bias", "decoder_blocks.7.norm2.weight"):
        assert decays[name] == 0.0


def test_weight_decay_is_the_official_one(base: MixMIM) -> None:
    """By name; the official list is of the classifier, which has a head and no decoder."""
    official = json.loads((GOLDEN / "official_layer_decay_base.json").read_text())
    decays = decay_by_name(base, PretrainConfig())
    assert official.keys() - decays.keys() == {"head.weight", "head.bias"}
    ours_alone = decays.keys() - official.keys()
    assert all(name.startswith("decoder_") or name == "mask_token" for name in ours_alone)
    for name in official.keys() & decays.keys():
        assert decays[name] == official[name]["weight_decay"], name


def test_the_optimizer_has_the_recipes_settings() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), dataclasses.replace(SMALL, weight_decay=0.1, betas=(0.8, 0.9)))
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(1e-3), (0.8, 0.9), decay)


# The data path


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - augmentation, not secrets


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (600, 600)])
@pytest.mark.parametrize("min_crop", [0.2, 0.6])
def test_crops_stay_inside_and_within_their_bounds(width: int, height: int, min_crop: float) -> None:
    rng = seeded(0)
    boxes = np.array([random_crop_box(width, height, min_crop, rng) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    shares = (right - left) * (lower - upper) / (width * height)
    ratios = (right - left) / (lower - upper)
    assert shares.min() > min_crop * 0.99  # sides are whole pixels
    assert ratios.min() > ASPECT_RATIOS[0] * 0.99
    assert ratios.max() < ASPECT_RATIOS[1] * 1.01
    assert left.min() == upper.min() == 0  # inside, and up to the border
    assert (right.max(), lower.max()) == (width, height)
    # All that is allowed does occur; large crops of an oblong photo cannot be oblong the other way.
    assert shares.min() < min_crop + 0.02
    assert shares.max() > 0.95
    if min_crop < 0.5:
        assert ratios.max() > 1.31
        assert ratios.min() < 0.765


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (2000, 60, (960, 0, 1040, 60)),  # 80 x 60, in the middle
        (60, 2000, (0, 960, 60, 1040)),
        (1, 1, (0, 0, 1, 1)),
        (5000, 1, (2499, 0, 2500, 1)),
        (1, 5000, (0, 2499, 1, 2500)),
    ],
)
def test_shapes_without_a_crop_fall_back_to_the_centre(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    for seed in range(20):
        assert random_crop_box(width, height, 0.2, seeded(seed)) == box
    assert crop_and_flip(photo(0, width, height), 32, 0.2, seeded(0)).shape == (32, 32, 3)


def test_crop_and_flip_is_decided_by_its_seed() -> None:
    image = photo(1, 200, 150)
    views = [crop_and_flip(image, 32, 0.2, seeded(seed)) for seed in range(10)]
    assert {(view.shape, view.dtype) for view in views} == {((32, 32, 3), np.dtype(np.uint8))}
    for seed, view in enumerate(views):
        np.testing.assert_array_equal(crop_and_flip(image, 32, 0.2, seeded(seed)), view)
    assert len({view.tobytes() for view in views}) == 10


def test_crop_and_flip_equals_three_plain_steps() -> None:
    """Crop, resize, flip, one after the other; about half of the views are flipped.

    In one step Pillow's filter sees past the edge of the box, so pixels at the border may differ a little.
    """
    image = photo(2, 200, 150)
    flipped = 0
    for seed in range(400):
        box = random_crop_box(image.width, image.height, 0.2, seeded(seed))
        plain = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BICUBIC))
        view = crop_and_flip(image, 16, 0.2, seeded(seed)).astype(int)
        distances = [np.abs(view - plain).max(), np.abs(view - plain[:, ::-1]).max()]
        assert min(distances) < 20 < max(distances)
        flipped += distances[1] < distances[0]
    assert 150 < flipped < 250  # five standard deviations


def test_the_sampler_shuffles_every_epoch_anew() -> None:
    sampler, twin, other = EpochSampler(50, 3), EpochSampler(50, 3), EpochSampler(50, 4)
    orders = []
    for epoch in range(4):
        sampler.epoch = twin.epoch = other.epoch = epoch
        pairs = list(sampler)
        assert pairs == list(twin) == list(sampler)
        assert pairs != list(other)
        assert {pair[0] for pair in pairs} == {epoch}
        orders.append([index for _, index in pairs])
        assert sorted(orders[-1]) == list(range(50)) != orders[-1]
    assert len({tuple(order) for order in orders}) == 4
    assert len(sampler) == 50


def test_an_item_depends_on_seed_epoch_and_index_alone(photos: Path) -> None:
    paths = sorted(photos.iterdir())
    images, twin = PretrainingImages(paths, 32, SMALL), PretrainingImages(paths, 32, SMALL)
    item = images[0, 5]
    assert isinstance(item, np.ndarray)
    for key in ((1, 5), (0, 4), (3, 0)):  # other items first change nothing
        assert not np.array_equal(twin[key], item)
    np.testing.assert_array_equal(twin[0, 5], item)
    assert not np.array_equal(PretrainingImages(paths, 32, dataclasses.replace(SMALL, seed=1))[0, 5], item)
    assert len(images) == 24


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on
def test_batches_do_not_depend_on_the_number_of_workers(spoilt: Path) -> None:
    for epoch in (0, 1):
        loaders = [build_loader(spoilt, 32, dataclasses.replace(SMALL, workers=workers)) for workers in (0, 1)]
        for _, sampler in loaders:
            sampler.epoch = epoch
        here, there = (list(loader) for loader, _ in loaders)
        assert len(here) == len(there) == STEPS_PER_EPOCH
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one.pixels_BHWC, other.pixels_BHWC)
            assert one.unreadable == other.unreadable
    assert sum(len(batch.unreadable) for batch in here) == 2


def test_collate_keeps_what_could_be_read() -> None:
    image = np.full((4, 4, 3), 7, np.uint8)
    batch = collate([image, "a.jpg: damaged", image])
    assert batch.pixels_BHWC.shape == (2, 4, 4, 3)
    assert batch.pixels_BHWC.dtype == torch.uint8
    assert batch.unreadable == ("a.jpg: damaged",)
    assert len(collate(["a.jpg: damaged"]).pixels_BHWC) == 0


def test_pixels_are_normalised_as_for_evaluation(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, photos, tmp_path)
    pixels_BHWC = first_batch(photos).pixels_BHWC
    expected = [normalize(pixels.numpy(), Preprocessing.evaluation(64)) for pixels in pixels_BHWC]
    actual = trainer.normalize(pixels_BHWC.to(trainer.device)).cpu()
    np.testing.assert_allclose(actual.numpy(), np.stack(expected), atol=1e-5, rtol=0)


# Whole runs


def test_a_run_leaves_the_documented_files(run: Run) -> None:
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    names = {"config.json", "metrics.jsonl", "state.pt", "checkpoints/epoch-0001.safetensors", "final.safetensors"}
    assert files == names
    assert run.final == run.path / "final.safetensors"
    values = json.loads((run.path / "config.json").read_text())
    assert PretrainConfig(**values | {"betas": tuple(values["betas"])}) == SMALL
    assert "epoch 1/2  loss" in run.printed
    assert "epoch 2/2  loss" in run.printed
    assert "unreadable" not in run.printed


def test_metrics_say_what_was_done(run: Run) -> None:
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]
    for line in run.metrics:
        assert line.keys() == {"step", "epoch", "loss", "lr", "rate"}
        assert line["epoch"] == pytest.approx(line["step"] / STEPS_PER_EPOCH, abs=1e-4)
        assert line["lr"] == pytest.approx(learning_rate((line["step"] - 1) / STEPS_PER_EPOCH, SMALL))
        assert 0 < line["loss"] < 10
        assert 0 < line["rate"] < math.inf


def test_the_final_checkpoint_can_be_used(run: Run) -> None:
    model, description = load_checkpoint(run.final)
    assert isinstance(model, MixMIM)
    assert description.arch == SMALL.arch == architecture("tiny").at(64)
    assert description.preprocessing == Preprocessing.evaluation(64)
    provenance = description.provenance
    assert (provenance["epochs"], provenance["images"]) == (2, 24)
    assert provenance["loss"] == run.losses[-1]
    assert provenance["recipe"]["batch_size"] == 8
    with torch.inference_mode():
        embedding = model(torch.randn(2, 3, 64, 64)).embedding_BD
    assert embedding.shape == (2, 256)
    assert embedding.isfinite().all()
    first = read_checkpoint(run.path / "checkpoints" / "epoch-0001.safetensors")
    assert first[0].provenance["epochs"] == 1
    assert not torch.equal(first[1]["norm.weight"], model.norm.weight)


def test_the_same_seed_gives_the_same_weights(run: Run, photos: Path, tmp_path: Path) -> None:
    again = run_pretraining(SMALL, photos, tmp_path / "again")
    assert again.losses == run.losses
    one, two = (read_checkpoint(path)[1] for path in (again.final, run.final))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_line_is_the_mean_since_the_last_one(run: Run, photos: Path, tmp_path: Path) -> None:
    """Also across epochs, and the steps after the last multiple are not lost; logging changes no number."""
    rare = run_pretraining(dataclasses.replace(SMALL, log_every=4, checkpoint_every=9), photos, tmp_path / "rare")
    assert [line["step"] for line in rare.metrics] == [4, 6]
    assert rare.losses == pytest.approx([np.mean(run.losses[:4]), np.mean(run.losses[4:])], abs=2e-6)
    assert not list((rare.path / "checkpoints").iterdir())
    never = run_pretraining(dataclasses.replace(SMALL, epochs=1, log_every=10), photos, tmp_path / "never")
    assert [line["step"] for line in never.metrics] == [3]
    assert read_checkpoint(never.final)[0].provenance["loss"] == never.losses[0]


def test_another_seed_gives_other_weights(photos: Path, tmp_path: Path) -> None:
    one, two = (Trainer(dataclasses.replace(SMALL, seed=seed), photos, tmp_path / "run") for seed in (0, 1))
    assert not torch.equal(one.model.mask_token, two.model.mask_token)
    assert not torch.equal(next(iter(one.loader)).pixels_BHWC, next(iter(two.loader)).pixels_BHWC)


def test_unreadable_images_are_skipped_and_named_once(spoilt: Path, tmp_path: Path) -> None:
    run = run_pretraining(SMALL, spoilt, tmp_path / "run")
    lines = sorted((run.path / "unreadable.txt").read_text().splitlines())
    assert len(lines) == 2
    assert lines[0].startswith(f"{spoilt}/holiday/cut.jpeg: the JPEG image is truncated")
    assert lines[1].startswith(f"{spoilt}/letter.jpg: the data is not an image")
    last_epoch = next(line for line in run.printed.splitlines() if "epoch 2/2" in line)
    assert "2 unreadable" in last_epoch
    assert len(run.metrics) == 2 * STEPS_PER_EPOCH
    assert all(math.isfinite(loss) for loss in run.losses)
    assert load_checkpoint(run.final)[1].provenance["images"] == 24  # as listed


def test_the_loss_falls(tmp_path: Path) -> None:
    """30 steps on ramps in four directions, the same ramp in each unit of an image.

    What was hidden can only be told from what is visible: whoever ignores that stays at a loss of 1.
    """
    ramp = np.tile(np.linspace(40, 215, 32).astype(np.uint8), (64, 2))
    (tmp_path / "ramps").mkdir()
    for number in range(8):
        Image.fromarray(np.rot90(ramp, number).copy()).save(tmp_path / "ramps" / f"{number}.png")
    config = dataclasses.replace(SMALL, epochs=30, warmup_epochs=3, min_crop=1.0, checkpoint_every=99)
    losses = run_pretraining(config, tmp_path / "ramps", tmp_path / "run").losses
    assert len(losses) == 30
    assert losses[0] > 0.9
    assert losses[-1] < 0.3


def test_bf16_is_near_float32(photos: Path, tmp_path: Path) -> None:
    losses = {}
    for bf16 in (False, True):
        trainer = Trainer(dataclasses.replace(SMALL, bf16=bf16), photos, tmp_path / "run")
        losses[bf16] = float(trainer.train_step(first_batch(photos)))
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert losses[True] != losses[False]  # autocast was on
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def test_a_step_moves_every_parameter(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(SMALL, weight_decay=0.0), photos, tmp_path / "run")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train_step(first_batch(photos))
    still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about its own parts
def test_compiled_training_gives_the_same_losses(run: Run, photos: Path, tmp_path: Path) -> None:
    compiled = run_pretraining(dataclasses.replace(SMALL, compile=True), photos, tmp_path / "run")
    assert compiled.losses == pytest.approx(run.losses, rel=1e-3)
    load_checkpoint(compiled.final)


# Refusals


def test_a_run_folder_in_use_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of another run\n")
    with pytest.raises(ConfigError, match=r"is not empty: choose another folder for --out, nothing was overwritten"):
        pretrain(SMALL, photos, tmp_path, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "of another run\n"


def test_too_few_images_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "holds 24 images, fewer than a batch of 32": photos,
        "is not a folder": tmp_path / "missing",
        "holds no images": tmp_path / "empty",
    }
    for sentence, images in cases.items():
        with pytest.raises(DataError, match=sentence):
            pretrain(dataclasses.replace(SMALL, batch_size=32), images, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_one_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"{number}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"none of the images in .* could be read: see .*unreadable\.txt"):
        pretrain(SMALL, tmp_path / "images", tmp_path / "run", Console(quiet=True))
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == 8
    assert not (tmp_path / "run" / "final.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2: each image is mixed"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1"),
        ({"workers": -1}, "workers must be 0 .* or more, got -1"),
        ({"mask_ratio": 0.0}, "shares between 0 and 1"),
        ({"mask_ratio": 1.0}, "shares between 0 and 1"),
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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build(name: str) -> None:
    config = recipe(name)
    assert config.arch.decoder is not None
    assert config.peak_lr == config.base_lr * config.batch_size / 256
    assert dataclasses.replace(config) == config


def test_the_defaults_are_the_official_recipe() -> None:
    config = recipe("base-600ep")
    assert config.arch == architecture("base")
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (600, 40, 2048)
    assert (config.betas, config.weight_decay, config.mask_ratio, config.min_crop) == ((0.9, 0.95), 0.05, 0.5, 0.2)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'tiny': choose one of base-600ep, tiny-cpu"):
        recipe("tiny")


# The command


def test_the_command_trains(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from options to a checkpoint; only compilation, a minute of it, is left out."""
    monkeypatch.setitem(training.recipes.RECIPES, "tiny-cpu", lambda: dataclasses.replace(tiny_cpu(), compile=False))
    options = {"--size": "tiny", "--image-size": "64", "--epochs": "1", "--batch-size": "4", "--workers": "0"}
    flags = [word for option in options.items() for word in option]
    result = CliRunner().invoke(app, ["pretrain", str(photos), "--out", str(tmp_path / "run"), *flags])
    assert result.exit_code == 0, result.output
    final = tmp_path / "run" / "final.safetensors"
    assert f"wrote {final}; next: mixmim export {final} BUNDLE_DIR" in result.output
    assert load_checkpoint(final)[1].arch == architecture("tiny").at(64)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["epochs"], config["batch_size"], config["workers"]) == (1, 4, 0)
    assert config["warmup_epochs"] == pytest.approx(tiny_cpu().warmup_epochs / tiny_cpu().epochs)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 6  # one line, at the end


def test_the_command_passes_refusals_on(photos: Path, tmp_path: Path) -> None:
    for options, sentence in ((["--recipe", "huge"], "unknown recipe"), (["--image-size", "65"], "multiple of 32")):
        result = CliRunner().invoke(app, ["pretrain", str(photos), "--out", str(tmp_path / "run"), *options])
        assert isinstance(result.exception, ConfigError)
        assert sentence in str(result.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("compiler", "sentence"), [("/bin/c++", "torch.compile takes"), (None, "no C.. compiler found")]
)
def test_the_plan_says_whether_the_network_is_compiled(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, sentence: str
) -> None:
    monkeypatch.setattr("training.trainer.shutil.which", lambda _: compiler)
    monkeypatch.setattr("training.trainer.torch.compile", lambda function: function)
    trainer = Trainer(dataclasses.replace(SMALL, compile=True), photos, tmp_path / "run")
    assert trainer.plan().startswith("tiny at 64 px on cpu: 24 images, 2 epochs of 3 steps; ")
    assert re.search(sentence, trainer.plan())
    assert trainer.compiled == bool(compiler)
