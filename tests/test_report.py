"""RUN/report.html: its charts, what it says of runs that go well and that fail, and when it is written."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import training_data
from PIL import Image
from rich.console import Console
from training_data import NARROW

from mixmim_serve.sources import open_source
from training.config import FinetuneConfig
from training.evaluation.labelled import open_labelled
from training.finetuning import Finetuning
from training.pretraining import Pretraining
from training.report import REPORT, refresh, write_report
from training.report.chart import Axis, draw, short
from training.report.curves import POINTS, Curve, curves
from training.report.page import read_lines
from training.report.reading import CHARTS, findings
from training.trainer import train

WATCHED = dataclasses.replace(training_data.SMALL, epochs=3, keep_every=2, sample_every=2, monitor=16, report=True)


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)
    monkeypatch.setattr("training.finetuning.architecture", lambda _: NARROW)


@pytest.fixture(scope="module")
def run(photos: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, judged by labelled photos too; read-only."""
    folder = tmp_path_factory.mktemp("report") / "my <first> run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        source, (train_part, val_part) = open_source(photos), open_labelled(str(labelled))
        assert val_part is not None
        task = Pretraining(dataclasses.replace(WATCHED, knn_every=1), source, (train_part, val_part))
        assert train(task, source, folder, Console(quiet=True)) is not None
    return folder


class Page(HTMLParser):
    """What stands on a page: its tags are closed, in order; what it would fetch; its text."""

    VOID = {"meta", "img", "line", "circle", "polyline", "polygon"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: Path) -> Page:
    return Page((run / REPORT).read_text())


def log(run: Path, lines: Sequence[dict[str, Any]], **config: Any) -> Path:
    """A run folder with such a log."""
    run.mkdir(exist_ok=True)
    about = {
        "task": "pretrain",
        "start": "scratch",
        "images": {"source": "photos", "count": 500},
        "command": ["mixmim", "pretrain"],
        "config": dataclasses.asdict(WATCHED) | {"epochs": 100} | config,
    }
    (run / "config.json").write_text(json.dumps(about))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


# The page


def test_the_page_of_a_run(run: Path) -> None:
    page = page_of(run)
    assert "Pretraining: my <first> run" in page.text  # escaped
    assert "Finished after 3 epochs." in page.text
    charts = [attributes["aria-label"] for attributes in page.all("svg")]
    titles = [str(label).partition(":")[0] for label in charts]
    assert titles == ["Loss", "Accuracy", "Effective rank", "Decay of the spectrum", "Uniformity", "Dead dimensions",
                      "Learning rate", "Gradient norm", "Images per second"]  # fmt: skip
    for chart in CHARTS:
        assert (chart.reading in page.text) == chart.is_for("pretrain")
    assert "24 in" in page.text
    assert "embeddings of 16 fixed photos" in page.text
    assert "random weights" in page.text
    for heading in ("Nearest neighbours", "Reconstructions", "Curves", "The run"):
        assert heading in page.text


def test_the_page_is_self_contained(run: Path) -> None:
    text = (run / REPORT).read_text()
    page = Page(text)
    sources = [str(attributes["src"]) for attributes in page.all("img")]
    assert len(sources) == 4  # neighbours of the last and of no epoch, reconstructions of the last and the second
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not page.all("link")
    assert not page.all("script")
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert len(text) < 1_000_000
    assert "prefers-color-scheme: dark" in text


def test_pictures_are_the_latest_and_the_first(run: Path) -> None:
    said = [str(attributes["alt"]) for attributes in page_of(run).all("img")]
    assert said == [
        "Nearest neighbours after epoch 3",
        "Nearest neighbours before the first epoch",
        "Reconstructions after epoch 3",
        "Reconstructions after epoch 2",
    ]


def test_pictures_of_epochs_that_were_rewound_are_not_shown(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    lines = [json.dumps(line) for line in read_lines(copy / "metrics.jsonl") if line["epoch"] < 2]
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report(copy)
    assert [attributes["alt"] for attributes in page_of(copy).all("img")] == [
        "Nearest neighbours before the first epoch"
    ]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = Page(write_report(log(tmp_path / "run", [])).read_text())
    assert "No epoch has ended yet" in page.text
    assert "Nothing has been logged yet." in page.text
    assert "Epoch 0 of 100" in page.text
    assert any(attributes.get("http-equiv") == "refresh" for attributes in page.all("meta"))
    first = {"step": 0, "epoch": 0, "effective_rank": 12.5, "uniformity": -0.5}
    page = Page(write_report(log(tmp_path / "run", [first])).read_text())
    assert "No epoch has ended yet" in page.text
    assert len(page.all("svg")) == 2
    assert len(page.all("circle")) == 2
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "ep')  # as it is being written
    assert len(page_of(write_report(tmp_path / "run").parent).all("svg")) == 2


def test_a_finished_page_does_not_load_itself_again(run: Path) -> None:
    assert not any("http-equiv" in attributes for attributes in page_of(run).all("meta"))


def test_it_is_written_after_each_epoch(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def seeing(run: Path, say: object) -> None:
        refresh(run, print)
        seen.append(re.findall(r"Epoch \d|Finished", (run / REPORT).read_text())[0])

    monkeypatch.setattr("training.trainer.refresh", seeing)
    source = open_source(photos)
    train(Pretraining(WATCHED, source), source, tmp_path / "run", Console(quiet=True))
    assert seen == ["Epoch 0", "Epoch 1", "Epoch 2", "Finished"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_a_page_that_cannot_be_written_does_not_end_the_run(photos: Path, tmp_path: Path) -> None:
    source, said = open_source(photos), io.StringIO()

    class Folder(Pretraining):
        """Something of the page's name is in its way."""

        def pictures(self, epochs: int) -> dict[str, Image.Image]:
            (tmp_path / "run" / REPORT).mkdir(exist_ok=True)
            return {}

    console = Console(file=said, width=300, log_path=False)
    assert train(Folder(WATCHED, source), source, tmp_path / "run", console) is not None
    assert f"{REPORT} could not be written: Is a directory" in said.getvalue()


def test_fine_tuning_has_a_page_with_its_top1(labelled: Path, tmp_path: Path) -> None:
    images, validation = open_labelled(str(labelled))
    config = FinetuneConfig(
        size="tiny", image_size=64, epochs=2, warmup_epochs=0.5, batch_size=8, workers=0, log_every=1, bf16=False
    )
    task = Finetuning(config, images.classes, None, validation)
    assert train(task, images.source, tmp_path / "tuned", Console(quiet=True)) is not None
    page = page_of(tmp_path / "tuned")
    labels = [str(attributes["aria-label"]) for attributes in page.all("svg")]
    assert [label.partition(":")[0] for label in labels] == [
        "Loss", "Accuracy", "Learning rate", "Gradient norm", "Images per second",
    ]  # fmt: skip
    assert "Fine-tuning: tuned" in page.text
    assert "top-1 on the validation photos" in page.text
    assert "painting each patch" not in page.text


# What it says


def logged(**metrics: Sequence[float]) -> list[dict[str, Any]]:
    """Lines with these values, from epoch 0 on; a loss begins with epoch 1."""
    lines: list[dict[str, Any]] = []
    for name, values in metrics.items():
        first = 1 if name == "loss" else 0
        lines += [{"epoch": epoch, name: value} for epoch, value in enumerate(values, start=first)]
    return lines


def warnings(task: str, epochs: int, lines: list[dict[str, Any]]) -> list[str]:
    return [each.text for each in findings(task, epochs, lines) if each.is_warning]


GOOD: dict[str, list[float]] = {
    "loss": [1.1, 0.9, 0.85, 0.8, 0.78, 0.76, 0.75, 0.74, 0.73, 0.72],
    "effective_rank": [20, 40, 60, 80, 90, 95, 99, 100, 98, 100, 101],
    "dead_dimensions": [0.0] * 11,
    "knn20_top1": [30, 33, 36, 39, 41, 43, 45, 46, 47, 47, 46.5],
}


def test_a_run_that_goes_well_has_no_warning() -> None:
    lines = logged(**GOOD)
    assert warnings("pretrain", 10, lines) == []
    said = " ".join(each.text for each in findings("pretrain", 10, lines))
    assert "The loss went from 1.100 to 0.720." in said
    assert "about 101 dimensions; at the start 20" in said
    assert "k-NN accuracy is 46.5 %, at the start 30.0 %." in said


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loss", [1.1, 1.0, 1.0, 0.99, 1.0, 0.99, 1.0, 0.99, 0.99, 0.99], "hardly better than painting each patch"),
        ("loss", [0.9, 0.8, 0.7, 0.7, 0.75, 0.8, 0.8, 0.85, 0.9, 0.9], "The loss has risen from 0.700 to 0.900"),
        ("effective_rank", [60, 1.1] + [1.0] * 9, "is 1.0: the embeddings of all photos are the same"),
        ("effective_rank", [20, 80, 100, 90, 60, 50, 40, 30, 20, 10, 4], "fell from 100 after epoch 2 to 4"),
        ("dead_dimensions", [0.0] * 10 + [0.4], "40% of the dimensions hardly differ"),
        ("knn20_top1", [30, 35, 40, 45, 44, 43, 42, 41, 40, 39, 38], "was 45.0 % after epoch 3: that one is better"),
        ("knn20_top1", [30, 30, 30, 30, 30, 31, 31, 31, 31, 31, 31], "the run has not made the features better"),
    ],
)
def test_each_failure_is_a_warning(name: str, values: list[float], expected: str) -> None:
    found = warnings("pretrain", 10, logged(**(GOOD | {name: values})))
    assert len(found) == 1
    assert expected in found[0]


def test_warnings_come_first() -> None:
    found = findings("pretrain", 10, logged(**(GOOD | {"dead_dimensions": [0.5] * 11})))
    assert [each.is_warning for each in found] == [True, False, False, False]


def test_nothing_is_judged_too_early() -> None:
    """After two of a hundred epochs a loss near 1 and a k-NN accuracy of the start are as they should be."""
    lines = logged(loss=[1.2, 1.0], knn20_top1=[30, 30.5, 31])
    lines += [{"epoch": 1 + number / 10, "loss": 1.0} for number in range(10)]
    assert warnings("pretrain", 100, lines) == []


def test_features_that_dip_at_first_are_no_failure() -> None:
    """As in the run of docs/judging.md that goes well."""
    lines = logged(loss=[0.98, 0.92, 0.88, 0.88], effective_rank=[43, 14, 9, 7, 8], knn20_top1=[34, 30, 29, 27, 25.5])
    assert warnings("pretrain", 20, lines) == []


def test_labelled_photos_count_more_than_folders() -> None:
    lines = logged(folders_knn10_top1=[50, 40, 30, 20, 10], knn20_top1=[30, 35, 40, 45, 50])
    assert warnings("pretrain", 4, lines) == []


def test_a_classifier_that_overfits() -> None:
    lines = logged(loss=[2.0, 1.5, 1.2, 1.0], val_top1=[0, 50, 60, 55, 50])
    assert warnings("finetune", 4, lines) == ["Top-1 fell from 60.0 % after epoch 2 to 50.0 %: it overfits."]
    (said,) = warnings("finetune", 4, logged(loss=[2.0, 1.5, 1.2, 1.0]))
    assert "give some with --val" in said


# Curves and charts


def test_curves_take_what_the_log_has() -> None:
    lines = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1, "loss": 1.0, "lr": math.inf}, {"epoch": 1, "other": 3}]
    (loss,) = curves(lines, {"loss": "the loss", "lr": "rate", "missing": "none"})
    assert loss == Curve("the loss", (0.5, 1.0), (2.0, 1.0))
    assert loss.last == 1.0


def test_long_curves_keep_their_range_and_mean() -> None:
    values = [float(number % 10) for number in range(50 * POINTS)]
    curve = Curve("x", tuple(map(float, range(len(values)))), tuple(values))
    assert curve.is_thinned
    points = curve.points()
    assert len(points) == POINTS
    assert all((point.value, point.low, point.high) == (4.5, 0, 9) for point in points)
    assert curve.tenths() == [4.5] * 10
    assert Curve("x", (0.0, 1.0), (5.0, 6.0)).points()[1] == (1.0, 6.0, 6.0, 6.0)


def test_a_chart_shows_every_value_where_it_belongs() -> None:
    svg = draw("Title", [Curve("a", (0.0, 1.0, 2.0), (0.0, 5.0, 10.0)), Curve("b", (0.0, 2.0), (10.0, 0.0))])
    places = [tuple(map(float, pair)) for pair in re.findall(r'class="dot s0" cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)  # up is smaller
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.1)
    assert "<title>a 5 after epoch 1</title>" in svg
    assert 'aria-label="Title: a 10; b 0"' in svg
    assert svg.count("<polyline") == 2
    labels = re.findall(r'text-anchor="end">([\d.]+)</text>', svg)
    assert {"0", "10"} <= {label.removesuffix(".0") for label in labels}


def test_a_thinned_chart_shows_the_range() -> None:
    epochs = tuple(number / 100 for number in range(1000))
    svg = draw("Title", [Curve("a", epochs, tuple(float(number % 7) for number in range(1000)))])
    assert svg.count("<polygon") == 1
    assert svg.count("<circle") == 1  # the last
    assert len(svg) < 20_000


def test_the_reference_is_in_the_picture() -> None:
    svg = draw("Title", [Curve("a", (0.0, 1.0), (0.5, 0.6))], reference=(1.0, "known"))
    (place,) = re.findall(r'class="reference".*? y1="([\d.]+)"', svg)
    assert 0 < float(place) < 60
    assert ">known</text>" in svg


@pytest.mark.parametrize("values", [(3.0,), (3.0, 3.0), (0.0, 0.0), (-1.0, 1e-9), (1e-7, 2e-7), (1e6, 3e6)])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: tuple[float, ...], log: bool) -> None:
    svg = draw("Title", [Curve("a", tuple(map(float, range(len(values)))), values)], log=log)
    assert "nan" not in svg
    assert "inf" not in svg
    numbers = [float(number) for number in re.findall(r'c[xy]="([-\d.]+)"', svg)]
    assert all(0 <= number <= 360 for number in numbers)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0.61, 1.0, ["0.7", "0.8", "0.9", "1.0"]),
        (-2.1, -0.4, ["-2.0", "-1.5", "-1.0", "-0.5"]),
        (0, 1e-3, ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.0010"]),
        (0, 4000, ["0", "1,000", "2,000", "3,000", "4,000"]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[str]) -> None:
    assert [label for _, label in Axis(low, high, 0, 100).ticks()] == expected


def test_log_ticks() -> None:
    assert [label for _, label in Axis(0.1, 10, 0, 100, log=True).ticks()] == ["0.1", "1", "10"]
    assert [label for _, label in Axis(0.09, 3, 0, 100, log=True).ticks()] == ["0.1", "0.2", "0.5", "1", "2"]
    axis = Axis(0.1, 10, 0, 100, log=True)
    assert axis.place(1.0) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.123456, "0.123"), (45.678, "45.7"), (-3.14159, "-3.14"), (1234.5, "1,234"), (999.7, "1,000"),
     (0.00015, "1.5e-4"), (100.0, "100")],
)  # fmt: skip
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected
