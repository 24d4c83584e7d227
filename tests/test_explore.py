"""What is done with features: neighbours, near-doubles and maps are right, and their pages whole."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from extracting import features as extract
from extracting import small
from PIL import Image

from mixmim_serve.cli import main
from mixmim_serve.engines import Engine
from mixmim_serve.errors import BundleError, ConfigError, DataError, OutputError
from mixmim_serve.explore import pages
from mixmim_serve.explore.duplicates import duplicates
from mixmim_serve.explore.map import layout
from mixmim_serve.explore.neighbours import neighbours
from mixmim_serve.extract.features import FeatureFolder, embed_query
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.extract.pipeline import run_files


@pytest.fixture(scope="module")
def source(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos in two folders, three of them twice."""
    root = tmp_path_factory.mktemp("explore") / "photos"
    for number, path in enumerate(sorted(photos.iterdir())):
        for name in [f"{number % 2}/{path.name}", *([f"again/{path.name}"] if number < 3 else [])]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def out(engine: Engine, source: Path) -> Path:
    """Its features, in shards of 7."""
    extract(small(engine, source, source.parent / "out", images=7), engine)
    return source.parent / "out"


@pytest.fixture
def features(out: Path) -> FeatureFolder:
    return FeatureFolder(out)


@pytest.fixture
def everything(features: FeatureFolder) -> np.ndarray:
    """All vectors, of length 1."""
    return np.concatenate([block.vectors for block in features.blocks()])


@pytest.mark.parametrize("kind", ["parquet", "npy", "lance", "float16"])
def test_every_format_is_read_back_alike(engine: Engine, source: Path, out: Path, tmp_path: Path, kind: str) -> None:
    if kind == "lance":
        pytest.importorskip("lance")
    options = ExtractOptions(dtype="float16") if kind == "float16" else ExtractOptions(format=kind)
    extract(small(engine, source, tmp_path / "out", images=10, options=options), engine)
    found, expected = FeatureFolder(tmp_path / "out"), FeatureFolder(out)
    assert len(found) == len(expected) == 27
    rows = [26, 3, 3, 11]
    assert found.keys(rows) == expected.keys(rows)
    np.testing.assert_allclose(found.vectors(rows), expected.vectors(rows), atol=1e-3 if kind == "float16" else 0)
    assert [block.start for block in found.blocks()] == [0, 9, 18]


def test_rows_are_unit_vectors_in_the_order_of_the_source(
    features: FeatureFolder, everything: np.ndarray, engine: Engine, source: Path
) -> None:
    keys = features.keys(range(len(features)))
    assert keys == sorted(keys, key=lambda key: key.split("/"))
    vectors = np.stack(
        [each.outputs["embedding"] for each in run_files(engine, [source / k for k in keys], ["embedding"])]
    )
    np.testing.assert_allclose(everything, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("index_above", [1_000_000, 0], ids=["exact", "index"])
def test_neighbours_are_those_of_all_pairs(features: FeatureFolder, everything: np.ndarray, index_above: int) -> None:
    for row in (0, 5, 26):
        cosines = everything @ everything[row]
        best = np.lexsort((np.arange(len(cosines)), -cosines))[:6]
        found = neighbours(features, 3 * everything[row], 6, index_above=index_above)
        assert {each.row for each in found} == set(best.tolist())  # doubles may change places by a rounding
        assert [each.key for each in found] == features.keys([each.row for each in found])
        np.testing.assert_allclose([each.cosine for each in found], cosines[best], atol=1e-6)


def test_an_index_is_kept_for_its_own_features_only(
    engine: Engine, source: Path, tmp_path: Path, everything: np.ndarray
) -> None:
    job = small(engine, source, tmp_path / "out", images=7)
    extract(job, engine)
    (tmp_path / "out" / "index-0123456789abcdef.usearch").write_bytes(b"of other features")
    first = neighbours(FeatureFolder(tmp_path / "out"), everything[1], 3, index_above=0)
    (index,) = (tmp_path / "out").glob("index-*.usearch")
    made = index.stat().st_mtime_ns
    assert neighbours(FeatureFolder(tmp_path / "out"), everything[1], 3, index_above=0) == first
    assert index.stat().st_mtime_ns == made


@pytest.mark.parametrize("query", [np.ones(3), np.zeros(64), np.full(64, np.nan)])
def test_a_query_that_is_no_direction_is_refused(features: FeatureFolder, query: np.ndarray) -> None:
    with pytest.raises(OutputError, match="a query must have 64 finite numbers"):
        neighbours(features, query)


def test_doubles_are_grouped_with_the_first(features: FeatureFolder, everything: np.ndarray) -> None:
    groups = duplicates(features, 0.99999)
    assert sorted(group.keys for group in groups) == [
        ("0/00.jpg", "again/00.jpg"), ("0/02.jpg", "again/02.jpg"), ("1/01.jpg", "again/01.jpg"),
    ]  # fmt: skip
    assert all(cosine == pytest.approx(1, abs=1e-5) for group in groups for cosine in group.cosines)


@pytest.mark.parametrize("tile", [3, 4096])
def test_doubles_do_not_chain_and_none_is_missed(
    features: FeatureFolder, everything: np.ndarray, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr("mixmim_serve.explore.duplicates.TILE", tile)
    cosines = everything @ everything.T
    threshold = float(np.quantile(cosines[np.triu_indices(27, 1)], 0.7))
    first = list(range(27))
    for row in range(27):  # the plain way
        for other in range(row + 1, 27):
            if first[row] == row and first[other] == other and cosines[row, other] >= threshold:
                first[other] = row
    expected = {row: [other for other in range(27) if first[other] == row] for row in range(27) if first[row] == row}
    groups = duplicates(features, threshold)
    assert {group.keys for group in groups} == {
        tuple(features.keys(rows)) for rows in expected.values() if len(rows) > 1
    }
    assert [len(group.keys) for group in groups] == sorted((len(group.keys) for group in groups), reverse=True)
    assert all(min(group.cosines) >= threshold - 1e-5 for group in groups)


def test_a_threshold_that_is_no_cosine_is_refused(features: FeatureFolder) -> None:
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="threshold must be a cosine"):
            duplicates(features, threshold)


def test_doubles_lie_together_on_a_map(features: FeatureFolder) -> None:
    found = layout(features)
    assert np.array_equal(found.places, layout(features).places)
    assert found.places.min() == 0
    assert found.places.max() == pytest.approx(1)
    places = dict(zip(found.keys, found.places, strict=True))
    gaps = [np.linalg.norm(places[f"{n % 2}/0{n}.jpg"] - places[f"again/0{n}.jpg"]) for n in range(3)]
    assert max(gaps) < 0.2
    few = layout(features, 5)
    assert few.keys == tuple(features.keys([0, 6, 13, 20, 26]))


def pictures_of(page: str) -> list[Image.Image]:
    ElementTree.fromstring(re.sub(r"<script>.*</script>", "", page.partition("\n")[2], flags=re.S))  # noqa: S314 - ours
    assert "http" not in page
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([\w+/=]+)", page)]


def test_a_gallery_is_whole_and_escapes_names(features: FeatureFolder) -> None:
    keys = features.keys([0, 1])
    page = pages.gallery("<b>", [("a & b", pages.pictures(features, [(keys[1], 0.5), (keys[0], 0.25)]))])
    one, other = pictures_of(page)
    assert max(one.size) <= pages.THUMBNAIL
    assert "<b>" not in page
    assert page.index(f"0.5000 {keys[1]}") < page.index(f"0.2500 {keys[0]}")
    expected = pages.thumbnails(features, keys)
    for key, found in zip((keys[1], keys[0]), (one, other), strict=True):
        assert np.abs(np.asarray(found, int) - np.asarray(expected[key])).mean() < 8


def test_pictures_that_are_gone_are_grey(engine: Engine, source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "photos"))
    extract(small(engine, copy, tmp_path / "out"), engine)
    features = FeatureFolder(tmp_path / "out")
    (copy / "0" / "00.jpg").unlink()
    (copy / "0" / "02.jpg").write_text("no image")
    made = pages.thumbnails(features, ["0/00.jpg", "0/02.jpg", "0/04.jpg"])
    assert [image.getpixel((0, 0)) == (204, 204, 204) for _, image in sorted(made.items())] == [True, True, False]
    shutil.rmtree(copy)
    with pytest.raises(DataError, match="no such file or folder"):
        pages.thumbnails(features, ["0/04.jpg"])


def test_the_query_is_embedded_as_the_features_were(
    features: FeatureFolder, everything: np.ndarray, engine: Engine, source: Path, bundle_copy: Path
) -> None:
    key = features.keys([4])[0]
    vector = embed_query(features.manifest, (source / key).read_bytes())
    np.testing.assert_allclose(vector / np.linalg.norm(vector), everything[4], atol=1e-5)
    np.testing.assert_array_equal(vector, embed_query(features.manifest, (source / key).read_bytes(), bundle_copy))
    other = features.manifest | {"fingerprint": "0" * 32}
    with pytest.raises(OutputError, match="did not make these features"):
        embed_query(other, b"")
    with pytest.raises(BundleError):
        embed_query(features.manifest | {"bundle": "/nowhere"}, b"")


def test_features_that_are_none_are_refused(tmp_path: Path, features: FeatureFolder, out: Path) -> None:
    with pytest.raises(OutputError, match=r"has no manifest\.json: expected a folder written by `mixmim extract`"):
        FeatureFolder(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(features.manifest | {"shards": []}))
    with pytest.raises(OutputError, match="has no features yet"):
        FeatureFolder(tmp_path)


@pytest.fixture
def mixmim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["mixmim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr()

    return run


def test_the_commands(mixmim: Callable[..., tuple[str, str]], out: Path, source: Path, tmp_path: Path) -> None:
    printed, _ = mixmim("neighbours", out, source / "0" / "00.jpg", "--top", 3, "--html", tmp_path / "near.html")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["key"] for line in lines[:2]] == ["0/00.jpg", "again/00.jpg"]
    assert len(pictures_of((tmp_path / "near.html").read_text())) == 4
    printed, noted = mixmim("duplicates", out, "--threshold", 0.99999, "--html", tmp_path / "doubles.html")
    assert len(printed.splitlines()) == 3
    assert "3 groups; 3 of 27 images duplicate an earlier one" in noted
    assert len(pictures_of((tmp_path / "doubles.html").read_text())) == 6
