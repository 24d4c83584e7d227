"""Measures of embeddings during pretraining: what is logged, when, and that they change no number of the training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import training_data
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import MEASURED, NARROW, killed_in

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ConfigError
from mixmim_serve.model import build_model
from mixmim_serve.model.normalize import Normalize
from mixmim_serve.sources import Source, open_source
from training.config import PretrainConfig
from training.distributed import World
from training.evaluation.embed import run_network
from training.evaluation.labelled import open_labelled
from training.evaluation.monitor import FOLDERS_KNN, GAP, OTHER, SAME, TILE, Monitor
from training.evaluation.spectrum import spectrum
from training.pretraining import Pretraining
from training.trainer import train

CPU = torch.device("cpu")
MEASURES = {"effective_rank", "spectrum_decay", "dead_dimensions", "uniformity"}
PREPROCESSING = Preprocessing.evaluation(64)
# 24 photos in batches of 8: three steps per epoch.
WATCHED = dataclasses.replace(training_data.SMALL, epochs=4, keep_every=2, monitor=16, report=True)


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


def pretrain(config: PretrainConfig, photos: Path, run: Path, *, resume: bool = False) -> Path:
    source = open_source(photos)
    assert train(Pretraining(config, source), source, run, Console(quiet=True), resume=resume) is not None
    return run


@pytest.fixture(scope="module")
def watched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs with measures; read-only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        return pretrain(WATCHED, photos, tmp_path_factory.mktemp("watched") / "run")


def lines(run: Path) -> list[dict[str, float]]:
    """The log without the speed."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in read]


def model_of(seed: int = 0) -> Callable[..., dict[str, float]]:
    """What measures an untrained network after so many epochs."""
    torch.manual_seed(seed)
    model = build_model(NARROW).eval()

    def measure(monitor: Monitor, epochs: int = 0) -> dict[str, float]:
        return monitor.measure(model, Normalize(PREPROCESSING), CPU, epochs)

    return measure


# What is measured


def test_the_measures_are_those_of_the_evaluated_embeddings(photos: Path) -> None:
    """The same numbers as from the loader that `probe` uses, of the same photos."""
    source = open_source(photos)
    torch.manual_seed(0)
    model = build_model(NARROW).eval()
    found = Monitor(source, PREPROCESSING, 1000).measure(model, Normalize(PREPROCESSING), CPU, 0)
    embeddings = run_network(model, source, PREPROCESSING, World(0, 1, CPU)).values_NX
    assert found == pytest.approx(spectrum(embeddings).metrics(), abs=2e-3)
    assert found.keys() == MEASURES  # the photos are in no folders


def test_the_photos_are_spread_and_bounded(photos: Path) -> None:
    source = open_source(photos)
    assert Monitor(source, PREPROCESSING, 5).indices == [0, 4, 9, 14, 19]
    assert Monitor(source, PREPROCESSING, 24).indices == list(range(24))
    assert Monitor(source, PREPROCESSING, 1024).indices == list(range(24))


def test_photos_are_read_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(photos)
    monitor, measure = Monitor(source, PREPROCESSING, 10), model_of()
    first = measure(monitor)
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("read again"))
    assert measure(monitor, 1) == first
    assert model_of(1)(monitor, 2) != first


def test_unreadable_photos_are_left_out(spoilt: Path) -> None:
    source = open_source(spoilt)
    assert len(source.keys) == 24
    monitor = Monitor(source, PREPROCESSING, 1000)
    assert model_of()(monitor).keys() >= MEASURES
    assert len(monitor.indices) == 22


def test_fewer_than_two_photos_have_no_measures(photos: Path) -> None:
    monitor = Monitor(open_source(photos), PREPROCESSING, 1)
    assert model_of()(monitor) == {}
    assert monitor.neighbours(0) is None


def test_embeddings_that_are_not_finite_have_no_measures(photos: Path) -> None:
    monitor = Monitor(open_source(photos), PREPROCESSING, 8)
    model = build_model(NARROW).eval()
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    assert monitor.measure(model, Normalize(PREPROCESSING), CPU, 1) == {}
    assert monitor.neighbours(1) is None


def test_folders_are_taken_for_classes(labelled: Path, tmp_path: Path) -> None:
    measure = model_of()
    assert measure(Monitor(open_source(labelled / "train"), PREPROCESSING, 1000))[FOLDERS_KNN] == 100  # two colours
    for number in range(10):  # a folder for each photo
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (40, 40), (20 * number, 0, 90)).save(tmp_path / str(number) / "photo.png")
    source = open_source(tmp_path)
    assert source.labels is not None
    assert measure(Monitor(source, PREPROCESSING, 1000)).keys() == MEASURES


def test_each_photo_is_judged_by_the_others() -> None:
    """Two classes that alternate along a line: the nearest other is always of the other class."""
    monitor = Monitor.__new__(Monitor)
    angles = torch.linspace(0, 1, 20)
    monitor.unit_ND = torch.stack([angles.cos(), angles.sin()], dim=1)
    monitor.classes, monitor.labels_N = ("a", "b"), torch.arange(20) % 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.evaluation.monitor.JUDGES", 1)
        assert monitor._top1() == 0
    monitor.labels_N = (torch.arange(20) >= 10).long()
    assert monitor._top1() >= 90


# Nearest neighbours


def test_neighbours_are_eight_rows_of_photos_nearest_first(photos: Path) -> None:
    monitor, measure = Monitor(open_source(photos), PREPROCESSING, 1000), model_of()
    measure(monitor, 3)
    picture = monitor.neighbours(3)
    assert picture is not None
    assert picture.size == (8 * (TILE + GAP) + 3 * GAP, 8 * (TILE + GAP) + GAP)
    assert monitor.pixels_NHWC is not None
    cosines = monitor.unit_ND[3] @ monitor.unit_ND.T  # the second of the eight: 24 photos, every third
    cosines[3] = -2
    expected = [3, *cosines.argsort(descending=True)[:7].tolist()]
    row = np.asarray(picture)[GAP + TILE + GAP :][:TILE]
    for column, number in enumerate(expected):
        left = GAP + column * (TILE + GAP) + (2 * GAP if column else 0)
        tile = Image.fromarray(monitor.pixels_NHWC[number].numpy()).resize((TILE, TILE))
        assert np.array_equal(row[:, left : left + TILE], np.asarray(tile)), column
    assert monitor.neighbours(4) is None  # not measured then


def test_neighbours_of_classes_are_framed(labelled: Path) -> None:
    monitor, measure = Monitor(open_source(labelled / "train"), PREPROCESSING, 1000), model_of()
    measure(monitor, 0)
    pixels = np.asarray(monitor.neighbours(0))
    same, other = (tuple(bytes.fromhex(colour[1:])) for colour in (SAME, OTHER))
    assert (pixels == same).all(axis=2).any()
    assert not (pixels == other).all(axis=2).any()  # the two colours are far apart
    monitor.labels_N = torch.arange(24) % 2
    assert (np.asarray(monitor.neighbours(0)) == other).all(axis=2).any()


# In a run


def test_a_run_logs_them_before_its_first_epoch_and_after_each(watched: Path) -> None:
    measured = [line for line in lines(watched) if "effective_rank" in line]
    assert [(line["epoch"], line["step"]) for line in measured] == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    assert all(line.keys() == {"epoch", "step", *MEASURES} for line in measured)
    assert all(1 <= line["effective_rank"] <= 16 for line in measured)
    assert len({line["effective_rank"] for line in measured}) > 1


def test_tensorboard_has_them_too(watched: Path) -> None:
    events = EventAccumulator(str(watched))
    events.Reload()
    assert [event.step for event in events.Scalars("effective_rank")] == [0, 3, 6, 9, 12]
    assert [event.step for event in events.Images("neighbours")] == [0, 6, 12]  # at kept checkpoints


def test_neighbours_are_drawn_at_each_kept_checkpoint(watched: Path) -> None:
    names = sorted(path.name for path in (watched / "samples").glob("neighbours-*"))
    assert names == [f"neighbours-epoch-000{epoch}.png" for epoch in (0, 2, 4)]


def test_measuring_changes_no_number_of_the_training(photos: Path, watched: Path, tmp_path: Path) -> None:
    plain = pretrain(dataclasses.replace(WATCHED, monitor=0, report=False), photos, tmp_path / "plain")
    assert not any("effective_rank" in line for line in lines(plain))
    assert [line for line in lines(watched) if "loss" in line] == lines(plain)
    one, other = (load_file(run / "final.safetensors") for run in (watched, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (plain / "report.html").exists()
    assert not list((plain / "samples").glob("neighbours-*"))


def test_evaluating_leaves_the_generators_as_they_were(photos: Path, labelled: Path) -> None:
    """Its loaders draw a seed for their workers."""
    from training.task import evaluation

    train_part, val_part = open_labelled(str(labelled))
    assert val_part is not None
    task = Pretraining(WATCHED, open_source(photos), (train_part, val_part))
    before = torch.get_rng_state()
    with evaluation(task.objective, CPU):
        assert not task.objective.training
        found = task.evaluate(0, World(0, 1, CPU))
        task.pictures(0)
    assert found.keys() == {"knn20_top1", *MEASURES}
    assert torch.equal(torch.get_rng_state(), before)
    assert task.objective.training


@pytest.mark.parametrize("step", [0, 2, 3, 7, 11])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    photos: Path, watched: Path, tmp_path: Path, step: int
) -> None:
    """Killed in this step, counted from 0: before the first checkpoint, within an epoch, at its start."""
    with killed_in(step):
        pretrain(WATCHED, photos, tmp_path / "run")
    pretrain(WATCHED, photos, tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == lines(watched)
    one, other = (load_file(run / "final.safetensors") for run in (tmp_path / "run", watched))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("neighbours-epoch-0004.png", "reconstructions-epoch-0004.png"):
        assert (tmp_path / "run" / "samples" / name).read_bytes() == (watched / "samples" / name).read_bytes()


def test_measuring_can_be_switched_when_a_run_is_resumed(photos: Path, watched: Path, tmp_path: Path) -> None:
    """As a run of an earlier version, whose configuration knows neither setting."""
    with killed_in(7):
        pretrain(dataclasses.replace(WATCHED, monitor=0, report=False), photos, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    del about["config"]["monitor"], about["config"]["report"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    pretrain(WATCHED, photos, tmp_path / "run", resume=True)
    assert [line["epoch"] for line in lines(tmp_path / "run") if "effective_rank" in line] == [3, 4]
    assert [line for line in lines(tmp_path / "run") if "loss" in line] == [
        line for line in lines(watched) if "loss" in line
    ]


def test_only_the_first_process_measures(photos: Path) -> None:
    """Unless the network is split over all: then each has to take part in its forward pass."""
    task = Pretraining(WATCHED, open_source(photos))
    assert task.evaluate(1, World(1, 2, CPU)) == {}
    assert "neighbours" not in task.pictures(2)
    split = Pretraining(dataclasses.replace(WATCHED, shard=True), open_source(photos))
    assert split.evaluate(1, World(1, 2, CPU)).keys() == MEASURES


@pytest.mark.parametrize(
    ("epochs", "keep_every", "times"),
    [(4, 1000, 5), (100, 1000, 101), (600, 1000, 101), (601, 1000, 87), (600, 20, 121)],
)
def test_a_run_measures_about_a_hundred_times(source: Source, epochs: int, keep_every: int, times: int) -> None:
    task = Pretraining(dataclasses.replace(WATCHED, epochs=epochs, keep_every=keep_every), source)
    due = [epoch for epoch in range(epochs + 1) if task.measures(epoch)]
    assert len(due) == times
    assert (due[0], due[-1]) == (0, epochs)


@pytest.fixture
def source(photos: Path) -> Source:
    return open_source(photos)


def test_a_negative_number_of_photos_is_refused() -> None:
    with pytest.raises(ConfigError, match="monitor must be a number of photos, or 0 for none, got -1"):
        dataclasses.replace(WATCHED, monitor=-1)
