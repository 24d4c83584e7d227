"""The scripts that train several networks: what they compare is equal, and what is finished is not done again."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from PIL import Image
from training_data import NARROW, SMALL

from mixmim_serve.config import architecture
from mixmim_serve.model import Encoder
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.data import TrainingImages
from training.evaluation.compare import draw_few, few_shot
from training.evaluation.probe import Embedded
from training.recipes import tiny_cpu, tiny_finetune_cpu
from training.task import Task

sys.path.insert(0, str(REPOSITORY))

from benchmarks import ablation, bet, cost, learning, neighbours, runs, search


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`, and a recipe of one epoch or as many as asked for."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)
    recipe = dataclasses.replace(SMALL, epochs=1, warmup_epochs=0, batch_size=4, keep_every=1000)
    for module in (ablation, bet, neighbours, search):
        monkeypatch.setattr(module, "tiny_cpu", lambda: recipe)
    tuning = dataclasses.replace(tiny_finetune_cpu(), batch_size=4, workers=0)
    monkeypatch.setattr(learning, "tiny_finetune_cpu", lambda: tuning)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of two classes, red and blue, 12 photos to train on and 4 in each other part; read-only."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("clothing10", "caltech99"):
        for part, count in (("train", 6), ("val", 2), ("test", 2)):
            for channel, colour in ((0, "red"), (2, "blue")):
                (folder / name / part / colour).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 100, (72, 72, 3), dtype=np.uint8)
                    pixels[..., channel] += 150
                    Image.fromarray(pixels).save(folder / name / part / colour / f"{number}.png")
    return folder


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def test_the_bet_is_judged_and_not_trained_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bet"
    arguments = (data / "clothing10" / "train", data, "--out", out, "--epochs", 2, "--seeds", 0, "--only")
    changes = ("--set", "feature_blocks=1", "--all", "min_crop=0.5")
    run(bet, monkeypatch, *arguments, "pixels", "pixels and features", *changes)
    config = json.loads((out / "pixels-and-features-0" / "config.json").read_text())["config"]
    assert (config["epochs"], config["feature_weight"], config["feature_blocks"]) == (2, 1.0, 1)
    config = json.loads((out / "pixels-0" / "config.json").read_text())["config"]
    assert (config["epochs"], config["feature_blocks"], config["min_crop"]) == (2, 4, 0.5)
    found = json.loads((out / "results.json").read_text())
    plain, both = found["pixels"]["0"], found["pixels and features"]["0"]
    on = {"clothing10 val, k-NN", "clothing10 test, k-NN", "caltech99 val, k-NN"}
    assert plain.keys() == on | {"loss", "images/s"}
    assert both.keys() == on | {f"{name}, average" for name in on} | {"loss", "images/s", "target std"}
    assert all(0 <= both[name] <= 100 for name in on)
    table = (out / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| pixels", "| pixels and features"]

    monkeypatch.setattr("training.trainer.Trainer.fit", lambda *_: pytest.fail("trained again"))
    run(bet, monkeypatch, *arguments, "pixels")


def test_as_many_epochs_as_cost_the_same(tmp_path: Path, data: Path) -> None:
    """Seconds per image and images of an epoch both count."""
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"seconds per image": {"one": 0.01, "two": 0.02, "few": 0.01}}))
    large, small = open_source(data / "clothing10"), open_source(data / "clothing10" / "val")
    tasks = dict.fromkeys(("one", "two", "few"), lambda: pytest.fail("measured again"))
    found = cost.epochs_at_equal_cost(path, tasks, {"one": large, "two": large, "few": small}, "two", 10)
    assert found == {"one": 20, "two": 10, "few": 20 * len(large.keys) // len(small.keys)}


def test_the_cost_alone_trains_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 1)
    run(bet, monkeypatch, data / "clothing10" / "train", data, "--out", tmp_path, "--cost")
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    costs = json.loads((tmp_path / "cost.json").read_text())["seconds per image"]
    assert costs.keys() == bet.VARIANTS.keys() - {bet.LONGER}


def test_the_cost_of_a_step_is_measured(data: Path) -> None:
    source = open_source(data / "clothing10" / "train")
    configs = {"plain": {}, "features": {"feature_weight": 1.0}}
    tasks: dict[str, Task] = {
        name: bet.Pretraining(dataclasses.replace(bet.configuration("pixels", 1, 0), **changes), None)
        for name, changes in configs.items()
    }
    before = {name: task.objective.model.norm.weight.clone() for name, task in tasks.items()}
    found = cost.seconds_per_image(tasks, dict.fromkeys(tasks, source), rounds=4)  # more than an epoch's three steps
    assert all(0 < seconds < 10 for seconds in found.values())
    assert all(not torch.equal(task.objective.model.norm.weight, before[name]) for name, task in tasks.items())


# Neighbours


def test_crops_of_a_photo_are_told_from_all_others() -> None:
    torch.manual_seed(0)
    objective = neighbours.ContrastiveObjective(Encoder(dataclasses.replace(NARROW, decoder=None)))
    pixels = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        unit = F.normalize(objective.projection(objective.model(pixels).embedding_BD))
        found = float(objective(pixels))
    weights = (unit @ unit.T / 0.2).exp().double()
    expected = [
        -math.log(weights[row, (row + 3) % 6] / sum(weights[row, other] for other in range(6) if other != row))
        for row in range(6)
    ]
    assert found == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_a_batch_of_simclr_has_two_crops_of_each_photo(data: Path) -> None:
    source = open_source(data / "clothing10" / "train")
    config: PretrainConfig = neighbours.tiny_cpu()
    one, two = (TrainingImages(source, 64, config, crops=crops) for crops in (1, 2))
    images = [two[0, index] for index in range(12)]
    assert all(image.pixels.shape == (128, 64, 3) for image in images)
    assert np.array_equal(images[0].pixels[:64], one[0, 0].pixels)  # the first crop is the one that there was
    assert all(not np.array_equal(image.pixels[:64], image.pixels[64:]) for image in images)
    task = neighbours.Contrastive(config)
    batch = neighbours.Batch(
        torch.stack([torch.from_numpy(image.pixels.copy()) for image in images[:3]]),
        torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool), (),
    )  # fmt: skip
    (pixels,) = task.inputs(batch, 0, 0)
    assert pixels.shape == (6, 3, 64, 64)
    expected = task.normalize(torch.from_numpy(images[1].pixels[None, 64:].copy()))
    assert torch.equal(pixels[4:5], expected)  # photo 1, second crop


def test_the_labels_of_all_sets_are_one_source(data: Path, tmp_path: Path) -> None:
    labelled = neighbours.all_labels(data, tmp_path)
    assert labelled.classes == ("caltech99/blue", "caltech99/red", "clothing10/blue", "clothing10/red")
    assert len(labelled.source.keys) == 24
    assert labelled.source.read(0)[:4] == b"\x89PNG"
    config = neighbours.supervised(neighbours.tiny_cpu())
    assert (config.base_lr, config.batch_size, config.min_crop) == (SMALL.base_lr, 4, SMALL.min_crop)
    assert (config.augment.mixup, config.layer_decay) == (0, 1)


@pytest.mark.slow
def test_all_neighbours_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(NARROW, decoder=None)
    monkeypatch.setattr("training.finetuning.architecture", lambda _: plain)
    monkeypatch.setattr("training.evaluation.probe.architecture", lambda *_, **__: plain)
    photos = data / "clothing10" / "train"
    run(neighbours, monkeypatch, photos, data, "--out", tmp_path / "out", "--epochs", 1, "--tune", 1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tuple(found) == neighbours.NAMES
    for values in found.values():
        for on in ("clothing10 test", "caltech99 val"):
            assert all(0 <= values["0"][f"{on}, {what}"] <= 100 for what in ("k-NN", "linear", "5-shot", "fine-tuned"))
    costs = json.loads((tmp_path / "out" / "cost.json").read_text())["seconds per image"]
    assert costs.keys() == {"mixmim", "simmim", "simclr", "supervised"}


# The ablation and the search


def test_the_ablation_runs_first_seeds_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(ablation, "trained", lambda task, source, run: done.append((run.name, task.config)))
    monkeypatch.setattr(ablation, "record", lambda *_: None)
    monkeypatch.setattr(ablation, "write_table", lambda *_: None)
    run(ablation, monkeypatch, data / "clothing10" / "train", data, "--out", tmp_path, "--epochs", 3)
    names = [name for name, _ in done]
    assert names[:6] == [runs.folder_of(Path(), name, 0).name for name in ablation.VARIANTS]
    assert names[6:] == ["mixmim-1", "attention-across-both-images-1", "one-reconstruction-1"]
    configs = dict(done)
    assert {config.epochs for config in configs.values()} == {3}
    across = [name for name, config in configs.items() if config.attention == "across"]
    assert across == ["mask-tokens-for-mixing-0", "attention-across-both-images-0", "attention-across-both-images-1"]
    assert (configs["mask-ratio-0.75-0"].mask_ratio, configs["mixmim-1"].seed) == (0.75, 1)
    done.clear()
    run(ablation, monkeypatch, data / "clothing10" / "train", data, "--out", tmp_path, "--only", "mixmim", "--seeds", 7)
    assert [name for name, _ in done] == ["mixmim-7"]


@pytest.mark.slow
def test_a_variant_of_the_ablation_is_fine_tuned(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ("--only", "mask tokens for mixing", "--tune", 1, "--epochs", 1)
    run(ablation, monkeypatch, data / "clothing10" / "train", data, "--out", tmp_path, *only)
    (values,) = json.loads((tmp_path / "results.json").read_text())["mask tokens for mixing"].values()
    assert {"clothing10 test, fine-tuned", "caltech99 val, linear", "caltech99 val, 5-shot"} <= values.keys()


@pytest.mark.parametrize("name", search.VARIANTS)
def test_a_search_changes_one_thing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "tiny_cpu", tiny_cpu)
    monkeypatch.setattr("training.config.architecture", architecture)
    config, plain = (search.configuration(each, 5, 0) for each in (name, "as it is"))
    changed = {key: value for key, value in vars(config).items() if vars(plain).get(key) != value}
    assert changed == search.VARIANTS[name]
    assert config.arch.decoder.depth == search.VARIANTS[name].get("decoder_depth", 4)


# Judging


def test_few_shots_of_separate_classes_are_enough() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    centres = 5 * torch.eye(3)
    features = centres[labels] + 0.1 * torch.randn(60, 3)
    assert few_shot(Embedded(features, labels), Embedded(features, labels), runs.SHOTS)[0] == 100
    noise, _ = few_shot(Embedded(torch.randn(60, 3), labels), Embedded(torch.randn(60, 3), labels), runs.SHOTS)
    assert 10 < noise < 60
    rows = draw_few(labels[:7], 5, torch.Generator().manual_seed(0))
    assert sorted(labels[rows].tolist()) == [0, 0, 0, 1, 1, 2, 2]  # a class with fewer gives all
    assert len(set(rows.tolist())) == 7


def test_a_table_has_the_mean_and_deviation_of_what_is_finished(tmp_path: Path) -> None:
    for name, seed, values in (("a b", 0, {"x": 10.0}), ("a b", 12, {"x": 20.0, "y": 0.5}), ("a", 1, {"x": 30.0})):
        folder = runs.folder_of(tmp_path, name, seed)
        folder.mkdir()
        (folder / "judged.json").write_text(json.dumps(values))
    runs.folder_of(tmp_path, "a", 2).mkdir()  # not finished
    runs.write_table(tmp_path, ["a", "a b", "c"])
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| a | 1 | 30.0 |  |", "| a b | 0, 12 | 15.0 ± 7.1 | 0.500 |",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["a b"]["12"] == {"x": 20.0, "y": 0.5}
