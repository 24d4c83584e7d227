"""The threshold for near-duplicates: chosen from the data, shown on the page, and doubted where groups are large."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from extracting import features as extract
from extracting import small
from pictures import photo
from typer.testing import CliRunner

from mixmim_serve.cli import app
from mixmim_serve.engines import Engine
from mixmim_serve.explore import threshold as module
from mixmim_serve.explore.duplicates import THRESHOLD, Group, duplicates
from mixmim_serve.explore.duplicates_page import IMAGES_SHOWN, duplicates_page
from mixmim_serve.explore.histogram import histogram
from mixmim_serve.explore.threshold import Choice, choose, from_vectors, suspicion
from mixmim_serve.extract.features import FeatureFolder

COPIES = 6


@pytest.fixture(scope="module")
def features(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    """70 photos, of which 6 are there again, saved at another quality."""
    root = tmp_path_factory.mktemp("threshold")
    (root / "photos").mkdir()
    for number in range(70):
        image = photo(number)
        image.save(root / "photos" / f"{number:02d}.jpg", quality=95)
        if number < COPIES:
            image.save(root / "photos" / f"{number:02d} copy.jpg", quality=60)
    extract(small(engine, root / "photos", root / "out", images=30), engine)
    return FeatureFolder(root / "out")


def cloud(rows: int, dimensions: int, size: float, copies: int, noise: float) -> np.ndarray:
    """Unit vectors around one direction, as images of one kind are, the first `copies` again with noise."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, dimensions + 1)))[0]
    vectors = basis[:, 0] + size * rng.normal(size=(rows, dimensions)) @ basis[:, 1:].T
    again = vectors[:copies] + noise * size * rng.normal(size=(copies, 64)) / 8
    both = np.concatenate([vectors, again])
    return both / np.linalg.norm(both, axis=1, keepdims=True)


def pairs_above(vectors: np.ndarray, threshold: float) -> set[tuple[int, ...]]:
    return set(map(tuple, np.argwhere(np.triu(vectors @ vectors.T >= threshold, 1)).tolist()))


@pytest.mark.parametrize("size", [1.0, 0.1, 0.02], ids=["diverse", "alike", "very alike"])
@pytest.mark.parametrize("copies", [0, 20, 100])
def test_the_threshold_follows_the_data(size: float, copies: int) -> None:
    """Images of one kind, whatever their cosines; without copies hardly any two are grouped, with them all copies."""
    vectors = cloud(500, 12, size, copies, 0.02)
    found, reason = from_vectors(vectors, len(vectors))
    planted, pairs = {(row, 500 + row) for row in range(copies)}, pairs_above(vectors, found)
    assert planted <= pairs
    assert len(pairs - planted) <= 4  # a pair by chance is four with a copy of each
    assert reason
    if size == 0.02:
        assert found > 0.9995 > THRESHOLD
        assert len(pairs_above(vectors, THRESHOLD)) > 500  # which would group nearly all


def test_dense_and_sparse_images_are_told_apart() -> None:
    """Two kinds in one folder: the dense one decides, or most of it would be copies."""
    dense, sparse = cloud(300, 12, 0.02, 0, 0), cloud(300, 12, 1.0, 20, 0.001)
    vectors = np.concatenate([dense, -sparse])
    pairs = pairs_above(vectors, from_vectors(vectors, len(vectors))[0])
    planted = {(300 + row, 600 + row) for row in range(20)}
    assert planted <= pairs
    assert len(pairs - planted) <= 2


def test_many_copies_of_one_image_do_not_pass_for_density() -> None:
    """Bursts: 15 images with 10 copies each, among 500."""
    vectors = cloud(500, 12, 0.1, 0, 0)
    rng = np.random.default_rng(1)
    copies = np.repeat(vectors[:15], 10, 0) + 0.0005 * rng.normal(size=(150, 64)) / 8
    both = np.concatenate([vectors, copies / np.linalg.norm(copies, axis=1, keepdims=True)])
    alone, with_copies = (from_vectors(each, len(each))[0] for each in (vectors, both))
    assert 1 - with_copies == pytest.approx(1 - alone, rel=0.2)
    pairs = pairs_above(both, with_copies)
    assert {(copy // 10, 500 + copy) for copy in range(150)} <= pairs
    assert len([pair for pair in pairs if min(pair) >= 15 and max(pair) < 500]) <= 2  # by chance


def test_few_images_take_the_default() -> None:
    found, reason = from_vectors(cloud(49, 12, 1, 0, 0), 49)
    assert found == THRESHOLD
    assert "49 images are too few" in reason


def test_the_bounds_hold() -> None:
    assert from_vectors(np.eye(100, dtype=np.float32), 100)[0] == pytest.approx(0.97)  # all far from each other
    assert from_vectors(np.tile(np.eye(1, 100), (100, 1)), 100)[0] == pytest.approx(0.99999)  # all alike


def test_it_is_chosen_from_all_images_or_a_sample(features: FeatureFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.concatenate([block.vectors for block in features.blocks()])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    choice = choose(features)
    np.testing.assert_allclose(choice.nearest, cosines.max(1), atol=1e-6)
    assert choice.images == len(features) == 76
    assert "in the median" in choice.reason
    monkeypatch.setattr(module, "SAMPLE", 60)
    monkeypatch.setattr(module, "TILE", 7)
    rows = np.unique(np.linspace(0, 75, 60).round().astype(int))
    np.testing.assert_allclose(choose(features).nearest, cosines.max(1)[rows], atol=1e-6)


def test_copies_are_found_without_a_threshold(features: FeatureFolder) -> None:
    choice = choose(features)
    assert 0.97 <= choice.threshold < 1
    groups = duplicates(features, choice.threshold)
    assert sorted(group.keys for group in groups) == [(f"{n:02d} copy.jpg", f"{n:02d}.jpg") for n in range(COPIES)]


def choice(threshold: float = 0.99, images: int = 500, automatic: float = 0.9975) -> Choice:
    return Choice(threshold, "chosen", np.linspace(0.9, 0.999, 50, dtype=np.float32), images, automatic)


def group(images: int) -> Group:
    return Group(tuple(map(str, range(images))), (1.0,) * images)


def test_large_groups_are_suspicious() -> None:
    assert suspicion([], choice()) == ""
    assert suspicion([group(2)] * 20, choice()) == ""
    assert suspicion([group(3)] * 39, choice()) == (
        "117 of 500 images are in groups: they may be alike rather than copies; try --threshold 0.9975"
    )
    assert suspicion([group(3)] * 39, choice(automatic=0.99)) == ""  # more copies are believed where the data says so
    assert suspicion([group(3)] * 51, choice(automatic=0.99)).endswith("try --threshold 0.9975")
    assert suspicion([group(2)] * 5, choice(images=12)) == ""
    assert suspicion([group(11)], choice()).startswith("one group has 11 images: they may be alike")


def test_the_suggestion_is_stricter(features: FeatureFolder) -> None:
    chosen = choose(features)
    assert chosen.replaced(None) == chosen
    loose, strict = chosen.replaced(0.5), chosen.replaced(0.9999)
    assert (loose.threshold, loose.stricter) == (0.5, chosen.threshold)
    assert strict.stricter == pytest.approx(0.999975)
    assert f"from the data it would be {chosen.threshold:.6g}" in loose.reason


def test_the_histogram_counts_every_image() -> None:
    nearest = np.array([0.5] * 7 + [0.99] * 3 + [1.0] * 2, np.float32)
    svg = ElementTree.fromstring(histogram(nearest, 0.999))  # noqa: S314 - ours
    bars = [
        (bar.get("class"), int(re.match(r"\d+", str(bar[0].text))[0]))  # type: ignore[index]
        for bar in svg.findall("rect")
    ]
    assert [each for each in bars if each[1]] == [("below", 7), ("below", 3), ("above", 2)]
    assert "threshold 0.999" in str(svg.get("aria-label"))
    (line,) = (line for line in svg.findall("line") if line.get("class") == "threshold")
    below = max(float(bar.get("x", 0)) for bar in svg.findall("rect") if bar.get("class") == "below")
    above = min(float(bar.get("x", 0)) for bar in svg.findall("rect") if bar.get("class") == "above")
    assert below <= float(line.get("x1", 0)) <= above + float(svg.findall("rect")[0].get("width", 0))
    labels = [text.text for text in svg.findall("text")]
    assert [label for label in labels if label and label[0] in "01"] == [
        "0", "0.9", "0.99", "0.999", "0.9999", "0.99999", "1",
    ]  # fmt: skip


def tree(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.partition("\n")[2])  # noqa: S314 - ours


def test_the_page_shows_threshold_distribution_and_warning(features: FeatureFolder) -> None:
    keys = features.keys(range(len(features)))
    groups = [Group(tuple(keys[:30]), (1.0,) * 30), Group(tuple(keys[40:42]), (1.0, 0.99))]
    page = tree(duplicates_page("near <b>", features, groups, choice(0.875, 76)))
    texts = ["".join(paragraph.itertext()) for paragraph in page.iter("p")]
    assert "Threshold: a cosine of 0.875 (chosen)" in texts[0]
    (warning,) = (each for each in page.iter("p") if each.get("class") == "warning")
    assert warning.text == suspicion(groups, choice(0.875, 76))
    assert len(list(page.iter("svg"))) == 1
    assert [heading.text for heading in page.iter("h2")] == ["30 images, the first 24 shown", "2 images"]
    assert [len(section.findall("figure")) for section in page.iter("section")] == [IMAGES_SHOWN, 2]
    assert page.find("body/h1").text == "near <b>"  # type: ignore[union-attr]
    without = tree(duplicates_page("none", features, [], choice(images=76)))
    assert not list(without.iter("h2"))
    assert len(list(without.iter("svg"))) == 1


def mixmim(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command(features: FeatureFolder, tmp_path: Path) -> None:
    chosen = choose(features)
    result = mixmim("duplicates", features.folder.place, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["keys"] for line in result.stdout.splitlines()] == [
        [f"{number:02d} copy.jpg", f"{number:02d}.jpg"] for number in range(COPIES)
    ]
    assert f"threshold {chosen.threshold:.6g}, {chosen.reason}\n" in result.stderr
    assert "warning" not in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert f"a cosine of {chosen.threshold:.6g}" in page
    assert html.escape(chosen.reason) in page
    result = mixmim("duplicates", features.folder.place, "--threshold", 0.5)
    assert f"threshold 0.5, as asked for; from the data it would be {chosen.threshold:.6g}" in result.stderr
    assert re.search(r"warning: \d\d of 76 images are in groups: .* try --threshold 0\.9\d+\n", result.stderr)
