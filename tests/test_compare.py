"""`mixmim compare`: each score against one computed by hand, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from training_data import NARROW
from typer.testing import CliRunner, Result

from mixmim_serve.cli import app
from mixmim_serve.config import Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, DataError, MixMIMError
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import save_checkpoint
from training.evaluation import compare
from training.evaluation.compare import draw_few, few_shot, retrieval_map
from training.evaluation.probe import Embedded

CLASSES = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 40, 20)}


def clusters(per_class: int, spread: float, seed: int) -> Embedded:
    """Three classes around three orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    return Embedded(torch.eye(3, 8)[labels] * 4 + spread * torch.randn(len(labels), 8, generator=generator), labels)


# Scores


def test_few_shot_is_sure_of_separate_classes_and_guesses_among_equal_ones() -> None:
    known, queries = clusters(20, 0.1, seed=0), clusters(50, 0.1, seed=1)
    assert few_shot(known, queries, 1) == (100.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    noise = Embedded(torch.randn(60, 8, generator=generator), known.labels_N)
    mean, deviation = few_shot(noise, Embedded(torch.randn(150, 8, generator=generator), queries.labels_N), 5)
    assert 20 < mean < 47
    assert deviation > 0


def test_more_shots_help() -> None:
    known, queries = clusters(40, 2.5, seed=0), clusters(200, 2.5, seed=1)
    one, ten = (few_shot(known, queries, shots)[0] for shots in (1, 10))
    assert ten > one + 5


def test_a_class_with_fewer_images_gives_what_it_has() -> None:
    assert few_shot(clusters(4, 0.1, seed=0), clusters(10, 0.1, seed=1), 10)[0] == 100


def test_draws_differ_and_are_the_same_for_every_model() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    first, second, again = (draw_few(labels, 3, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0))
    assert labels[first].bincount().tolist() == [3] * 5
    assert len(first.unique()) == 15
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_retrieval_is_scikit_learns_mean_average_precision() -> None:
    known, queries = clusters(15, 3.0, seed=0), clusters(5, 3.0, seed=1)
    unit = [torch.nn.functional.normalize(each.features_ND, dim=1) for each in (queries, known)]
    expected = [
        average_precision_score((known.labels_N == label).numpy(), row.numpy())
        for row, label in zip(unit[0] @ unit[1].T, queries.labels_N, strict=True)
    ]
    assert retrieval_map(known, queries) == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_retrieval_in_blocks_is_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known, queries = clusters(15, 3.0, seed=0), clusters(5, 3.0, seed=1)
    whole = retrieval_map(known, queries)
    monkeypatch.setattr(compare, "ROWS", 4)
    assert retrieval_map(known, queries) == pytest.approx(whole)


def test_images_of_a_class_without_training_images_are_left_out() -> None:
    known = clusters(5, 0.1, seed=0)
    assert retrieval_map(known[known.labels_N < 2], clusters(5, 0.1, seed=1)) == pytest.approx(1)


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two untrained networks, of 64 and of 96 px."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for size in (64, 96):
        torch.manual_seed(size)
        arch = NARROW.at(size) if size != NARROW.image_size else NARROW
        paths.append(folder / f"narrow-{size}.safetensors")
        save_checkpoint(paths[-1], build_model(arch).state_dict(), Description(arch, Preprocessing.evaluation(size)))
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val, 12 and 4 noisy images of each of three colours."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in CLASSES.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + rng.normal(0, 40, (40, 48, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RATE_SECONDS", 0.0)


def mixmim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> MixMIMError:
    error = mixmim(*arguments).exception
    assert isinstance(error, MixMIMError), error
    return error


def test_a_table_with_its_protocol(models: tuple[Path, Path], colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = mixmim("compare", *models, "--data", colours)
    assert result.exit_code == 0, result.output
    assert f"judged on 12 images of {colours / 'val'}, with 36 images of 3 classes" in result.stdout
    assert "k-NN: k = 10, cosine, temperature 0.07, augmentation none" in result.stdout
    titles = next(line for line in result.stdout.splitlines() if "linear" in line and "mAP" in line).split()
    assert titles == ["model", "px", "k-NN", "linear", "1-shot", "5-shot", "10-shot", "mAP", "rank", "images/s"]
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(str(models[0].parent))]
    assert [row[:2] for row in rows] == [[str(models[0]), "64"], [str(models[1]), "96"]]
    assert all(len(row) == len(titles) for row in rows)
    assert all("±" in cell for row in rows for cell in row[4:7])
    assert "the input sizes differ (64, 96 px)" in result.stderr


def test_the_table_fits_a_terminal(models: tuple[Path, Path], colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = mixmim("compare", models[0], "--data", colours).stdout.splitlines()
    (titles,) = [line for line in lines if "linear" in line and "mAP" in line]
    assert "images/s" in titles
    assert "…" not in "".join(lines)


def test_json_has_the_protocol_the_data_and_every_score(models: tuple[Path, Path], colours: Path) -> None:
    result = mixmim("compare", *models, "--data", colours, "--json")
    report = json.loads(result.stdout)
    assert report["protocol"]["augmentation"] == "none"
    assert report["protocol"]["knn"].items() >= {"k": 10, "temperature": 0.07, "metric": "cosine"}.items()
    assert report["data"]["classes"] == sorted(CLASSES)
    first, second = report["models"]
    assert (first["model"], first["image_size"], second["image_size"]) == (str(models[0]), 64, 96)
    assert (first["train_images"], first["images"]) == (36, 12)
    assert first["few_shot"].keys() == {"1", "5", "10"}
    assert first["linear"].keys() == {"top1", "lr", "sweep", "lr_chosen_by"}
    assert len(first["linear"]["sweep"]) > 5
    for model in (first, second):
        assert model["knn"] == 100  # colours alone tell the classes apart
        assert 33 < model["retrieval_map"] <= 100
        assert 1 <= model["effective_rank"] <= model["embedding_size"]
        assert model["images_per_second"] > 0
        assert model["unreadable"] == model["in_both"] == []


def test_it_scores_as_probe_does(models: tuple[Path, Path], colours: Path) -> None:
    probed = json.loads(mixmim("probe", colours, "--from", models[0], "--json").stdout)
    (compared,) = json.loads(mixmim("compare", models[0], "--data", colours, "--json").stdout)["models"]
    assert compared["knn"] == probed["knn"]["k=10"]["top1"]
    assert compared["linear"]["top1"] == probed["linear"]["top1"]
    assert compared["linear"]["lr"] == probed["linear"]["lr"]


def test_bundles_by_name_and_runs_that_are_not_finished(
    models: tuple[Path, Path], colours: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"config": {}, "task": "pretrain"}')
    assert "has no checkpoint yet" in str(refusal("compare", run, "--data", colours))
    shutil.copy(models[0], run / "checkpoints" / "step-00000003.safetensors")
    result = mixmim("compare", "tiny", run, "--data", colours, "--json")
    assert [each["model"] for each in json.loads(result.stdout)["models"]] == ["tiny", str(run)]
    assert f"{run} is not finished: judging its newest checkpoint, step-00000003.safetensors" in result.stderr
    assert "an effective rank cannot exceed their number" in result.stderr


def test_without_val_a_fifth_is_held_out_and_copies_count_once(
    models: tuple[Path, Path], colours: Path, tmp_path: Path
) -> None:
    shutil.copytree(colours / "train", tmp_path / "copied")
    shutil.copy(tmp_path / "copied" / "red" / "0.png", tmp_path / "copied" / "red" / "copy.png")
    result = mixmim("compare", models[0], "--data", tmp_path / "copied")
    assert "judged on 8 images, one in 5, with 28 images of 3 classes to learn from" in result.stdout
    for name in CLASSES:
        for number in range(1, 12):
            (tmp_path / "copied" / name / f"{number}.png").unlink()
    (tmp_path / "copied" / "red" / "copy.png").unlink()
    assert "too few images of class" in str(refusal("compare", models[0], "--data", tmp_path / "copied"))


def test_images_of_val_that_are_also_in_train_are_a_warning(
    models: tuple[Path, Path], colours: Path, tmp_path: Path
) -> None:
    shutil.copytree(colours, tmp_path / "leaking")
    shutil.copy(tmp_path / "leaking" / "train" / "red" / "0.png", tmp_path / "leaking" / "val" / "red" / "again.png")
    (tmp_path / "leaking" / "val" / "red" / "cut.png").write_bytes(b"no image")
    result = mixmim("compare", models[0], "--data", tmp_path / "leaking")
    assert "warning: 1 image of val also in train, such as red/again.png (in train: red/0.png)" in result.stderr
    assert "warning: 1 unreadable, such as red/cut.png" in result.stderr


def test_what_cannot_be_compared_is_refused(models: tuple[Path, Path], colours: Path, tmp_path: Path) -> None:
    assert isinstance(refusal("compare", tmp_path / "nothing.safetensors", "--data", colours), CheckpointError)
    (tmp_path / "flat").mkdir()
    shutil.copy(colours / "train" / "red" / "0.png", tmp_path / "flat")
    assert isinstance(refusal("compare", models[0], "--data", tmp_path / "flat"), DataError)
    assert "has only one class" in str(refusal("compare", models[0], "--data", _one_class(tmp_path, colours)))
    assert mixmim("compare", "--data", colours).exit_code == 2  # no model


def _one_class(folder: Path, colours: Path) -> Path:
    shutil.copytree(colours / "train" / "red", folder / "single" / "red")
    return folder / "single"
