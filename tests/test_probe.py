"""Evaluation without a val folder, and of images that were trained on: cross-validation, tables, warnings."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import NARROW
from typer.testing import CliRunner, Result

from mixmim_serve.cli import app
from mixmim_serve.config import Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import DataError
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import save_checkpoint
from training.evaluation.confusion import accuracy
from training.evaluation.linear import FOLDED, ProbeConfig, linear_probe, stratified_parts
from training.evaluation.probe import REPEATED, Embedded, cross_validate

CLASSES = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 40, 20)}
EACH = 8


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight noisy images of each of three colours, all in one folder per class."""
    root = tmp_path_factory.mktemp("flowers")
    rng = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir()
        for number in range(EACH):
            pixels = (np.array(colour) + rng.normal(0, 40, (40, 48, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("start") / "small.safetensors"
    save_checkpoint(path, build_model(NARROW).state_dict(), Description(NARROW, Preprocessing.evaluation(64)))
    return path


def mixmim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_without_val_every_image_is_judged_by_the_others(flowers: Path, start: Path) -> None:
    result = mixmim("probe", flowers, "--from", start, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["judged_on"].startswith("24 images by cross-validation in 5 parts, 2 times")
    assert report["knn"].keys() == {"k=1", "k=5", "k=10"}  # 19 images judge the others
    assert report["linear"]["images"] == 24
    assert report["linear"]["lr_chosen_by"] == FOLDED
    assert report["linear"].keys() >= {"top1", "top5", "top1_std", "lr", "sweep"}
    assert report["linear"]["top1"] > 60  # of three colours
    assert json.loads(mixmim("probe", flowers, "--from", start, "--json").stdout) == report


def test_a_table_for_people(flowers: Path, start: Path) -> None:
    said = mixmim("probe", flowers, "--from", start).stdout
    assert "cross-validation in 5 parts" in said
    assert [line.split("  ")[0].strip() for line in said.splitlines() if line.strip().startswith(("k-NN", "linear"))]
    assert "k-NN, k=10" in said
    assert "k-NN, k=20" not in said
    assert "±" in said
    assert "top-5" not in said  # of three classes
    assert "{" not in said


def test_the_mean_is_that_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features = torch.nn.functional.one_hot(labels, 6).float() + torch.randn(30, 6, generator=generator)
    config = ProbeConfig(epochs=5)
    results = cross_validate(Embedded(features, labels), 3, 5, REPEATED, config)
    assert len(results) == 5 * REPEATED
    expected = []
    for repeat in range(REPEATED):
        parts = stratified_parts(labels, 5, repeat)
        for part in range(5):
            kept, held = parts != part, parts == part
            head = linear_probe(features[kept], labels[kept], 3, config)
            expected.append(accuracy(head.scores(features[held]), labels[held]).top1)
    assert [linear.top1 for _, linear in results] == expected
    assert statistics.stdev(expected) > 0


def test_copies_do_not_judge_themselves(flowers: Path, start: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(flowers, tmp_path / "data"))
    for number in range(3):
        shutil.copy(data / "red" / "0.png", data / "red" / f"copy{number}.png")
    result = mixmim("probe", data, "--from", start, "--json")
    report = json.loads(result.stdout)
    assert (report["linear"]["images"], report["copies"]) == (24, 3)
    assert "note: 3 copies of other images were left out" in result.stderr


def test_five_photos_choose_no_rate(flowers: Path, start: Path, tmp_path: Path) -> None:
    for name, numbers in (("red", range(3)), ("blue", range(2))):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in numbers:
            shutil.copy(flowers / name / f"{number}.png", tmp_path / "few" / name)
    result = mixmim("probe", tmp_path / "few", "--from", start, "--json")
    report = json.loads(result.stdout)
    assert report["judged_on"].startswith("5 images by cross-validation in 2 parts")
    assert report["linear"]["sweep"] == {}
    assert "the default, too few images to choose" in result.stderr
    (tmp_path / "few" / "blue" / "1.png").unlink()
    error = mixmim("probe", tmp_path / "few", "--from", start).exception
    assert isinstance(error, DataError)
    assert "has a single image of class blue" in str(error)


def test_images_in_both_train_and_val_are_a_warning(flowers: Path, start: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        shutil.copytree(flowers / name, tmp_path / "train" / name)
        (tmp_path / "val" / name).mkdir(parents=True)
        shutil.copy(flowers / name / "7.png", tmp_path / "val" / name / "other.png")
    result = mixmim("probe", tmp_path, "--from", start, "--json")
    assert "warning: 3 images of val also in train, such as blue/other.png (in train: blue/7.png)" in result.stderr
    assert json.loads(result.stdout)["in_both"][0] == ["blue/other.png", "blue/7.png"]
    for name in CLASSES:
        (tmp_path / "train" / name / "7.png").unlink()
    assert "warning" not in mixmim("probe", tmp_path, "--from", start, "--json").stderr


def test_a_classifier_judged_on_its_training_images_is_a_warning(flowers: Path, start: Path, tmp_path: Path) -> None:
    """Those of a linear probe are named in its head, those of a fine-tuning in its run."""
    head = tmp_path / "head.safetensors"
    assert mixmim("probe", flowers, "--from", start, "--save", head).exit_code == 0
    result = mixmim("evaluate", flowers, "--from", head, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "warning: 24 images of these also in its training images" in result.stderr
    assert "recall, %" in result.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["in_training"]) == 24
    new = tmp_path / "new" / "red"
    new.mkdir(parents=True)
    Image.new("RGB", (48, 40), (222, 40, 20)).save(new / "1.png")
    result = mixmim("evaluate", tmp_path / "new", "--from", head, "--out", tmp_path / "report", "--json")
    assert "warning" not in result.stderr
    assert json.loads(result.stdout)["in_training"] == []
    told = mixmim("evaluate", tmp_path / "new", "--from", head, "--train", tmp_path / "new", "--out", tmp_path / "r")
    assert "warning: 1 image of these also" in told.stderr


def test_evaluate_takes_val_of_a_folder_with_both(flowers: Path, start: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    assert mixmim("probe", flowers, "--from", start, "--save", head).exit_code == 0
    for part, numbers in (("train", range(7)), ("val", range(7, 8))):
        for name in CLASSES:
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(flowers / name / f"{number}.png", tmp_path / "data" / part / name)
    result = mixmim("evaluate", tmp_path / "data", "--from", head, "--out", tmp_path / "report", "--json")
    assert json.loads(result.stdout)["accuracy"]["images"] == 3
