"""Classes and logits of a named head among the features, and folders that know which head they were begun with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from extracting import features, files_of, small
from heading import COLOURS, SHAPES, random_head, softmax, with_named_heads
from serving import Around, take_out
from test_cli import Mixmim, mixmim  # noqa: F401 - a fixture

from mixmim_serve import shipped
from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, OutputError
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.extract.table import Table, matrix
from mixmim_serve.heads import read_heads, write_heads
from mixmim_serve.preprocess import preprocess
from mixmim_serve.service.jobs.options import parse_options


@pytest.fixture
def several(bundle_copy: Path) -> Engine:
    """An engine with the heads main (the default), colours and shapes."""
    with_named_heads(bundle_copy)
    return open_engine(bundle_copy, "onnx", threads=1)


@pytest.fixture(scope="module")
def few(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(photos.iterdir())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def table_of(out: Path) -> pq.ParquetFile:
    (path,) = (out / "features").glob("*.parquet")
    return pq.read_table(path)


def test_classes_and_logits_are_those_of_the_head(several: Engine, few: Path, tmp_path: Path) -> None:
    options = ExtractOptions(("logits", "stage4"), batch=4, head="shapes")
    around = Around(several, list)
    assert features(small(several, few, tmp_path / "out", options=options), around).complete
    assert {tuple(outputs) for _, outputs in around.ran} == {("embedding", "stage4", "stage3")}  # once, for everything
    table, head = table_of(tmp_path / "out"), read_heads(several.bundle).choose("shapes")
    logits = matrix(table["logits"])
    assert logits.shape == (6, 2)
    for row, key in enumerate(table["key"].to_pylist()):
        pixels = preprocess((few / key).read_bytes(), several.bundle.description.preprocessing)[None]
        outputs = {name: array[0] for name, array in several.run("encoder", {"pixels": pixels}, head.inputs).items()}
        expected = head.logits(outputs)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert table["class"][row].as_py() == SHAPES[expected.argmax()]
        assert table["probability"][row].as_py() == pytest.approx(softmax(expected).max(), abs=1e-4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["head"] == {"name": "shapes", "fingerprint": head.fingerprint}
    assert (manifest["options"]["classes"], manifest["options"]["head"]) == (True, "shapes")


def test_without_a_name_the_default_head_is_taken(several: Engine, few: Path, tmp_path: Path) -> None:
    features(small(several, few, tmp_path / "out"), several)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["head"] == "main"
    assert "head" not in manifest  # the fingerprint covers it
    with_named_heads(several.bundle.path, default="colours")
    again = open_engine(several.bundle.path, "onnx", threads=1)
    features(small(again, few, tmp_path / "other"), again)
    assert set(table_of(tmp_path / "other")["class"].to_pylist()) <= {*COLOURS}


def test_a_begun_folder_keeps_its_head(several: Engine, few: Path, tmp_path: Path) -> None:
    """Also when another becomes the default, and that of older versions is the one in the network."""
    for name in ("main", "colours"):
        out = tmp_path / name
        options = ExtractOptions(batch=4, head=name)
        features(small(several, few, out, images=3, options=options), several)
        before = files_of(out / "features")
        (out / "features" / "000001.parquet").unlink()
        if name == "main":  # as an older version wrote it
            manifest = json.loads((out / "manifest.json").read_text())
            del manifest["options"]["head"], manifest["options"]["classes"]
            (out / "manifest.json").write_text(json.dumps(manifest))
        with_named_heads(several.bundle.path, default="shapes")  # the bundle that is open keeps what it read
        engine = open_engine(several.bundle.path, "onnx", threads=1)
        features(small(engine, few, out, images=3), engine)
        assert files_of(out / "features") == before


def test_a_head_that_was_fitted_again_does_not_go_on(several: Engine, few: Path, tmp_path: Path) -> None:
    options = ExtractOptions(batch=4, head="colours")
    features(small(several, few, tmp_path / "out", options=options), several)
    bundle = several.bundle
    write_heads(bundle, read_heads(bundle).plus(random_head(bundle, "colours", COLOURS, 7)))
    engine = open_engine(bundle.path, "onnx", threads=1)
    with pytest.raises(OutputError, match=r"the head colours of this bundle is not the one with which .* was started"):
        features(small(engine, few, tmp_path / "out", options=options), engine)
    with pytest.raises(OutputError, match=r"started with other options \(head colours\)"):
        features(small(engine, few, tmp_path / "out", options=ExtractOptions(batch=4, head="shapes")), engine)


def test_a_row_does_not_depend_on_the_images_beside_it(several: Engine) -> None:
    table = Table(several, ExtractOptions(("logits",), head="colours"))
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(9, 64)).astype(np.float32)
    from mixmim_serve.extract.table import Row

    rows = [Row(str(number), 1, 1, "") for number in range(9)]
    together = table.rows(rows, {"embedding": embedding})
    alone = [
        table.rows(rows[number : number + 1], {"embedding": embedding[number : number + 1]}) for number in range(9)
    ]
    for number, each in enumerate(alone):
        assert together.slice(number, 1).to_pylist() == each.to_pylist()


def test_a_network_without_a_head_has_logits_of_a_named_one(bundle_copy: Path, few: Path, tmp_path: Path) -> None:
    with_named_heads(take_out(bundle_copy, "head"))
    engine = open_engine(bundle_copy, "onnx", threads=1)
    features(small(engine, few, tmp_path / "out", options=ExtractOptions(("logits",), batch=4, classes=False)), engine)
    table = table_of(tmp_path / "out")
    assert "class" not in table.column_names
    assert matrix(table["logits"]).shape == (6, 4)  # of colours, the default


def test_what_cannot_be_meant_is_refused(several: Engine, bundle_copy: Path) -> None:
    with pytest.raises(ConfigError, match="unknown head 'hats': choose one of main, colours, shapes"):
        ExtractOptions(head="hats").check(several.bundle)
    with pytest.raises(ConfigError, match="the head colours is chosen, but no classes or logits"):
        ExtractOptions(head="colours", classes=False).check(several.bundle)
    ExtractOptions(("logits",), head="colours", classes=False).check(several.bundle)
    write_heads(several.bundle, read_heads(several.bundle).minus("colours").minus("shapes"))
    headless = open_bundle(take_out(bundle_copy, "head"))
    with pytest.raises(ConfigError, match="no classification head: extract without classes"):
        ExtractOptions(head="colours").check(headless)


def test_a_job_may_name_the_head(several: Engine) -> None:
    assert parse_options({"head": "shapes"}, several.bundle)["head"] == "shapes"
    assert parse_options({}, several.bundle)["head"] == "main"
    assert parse_options({"classes": False}, several.bundle)["head"] == ""
    with pytest.raises(ConfigError, match="unknown head 'hats'"):
        parse_options({"head": "hats"}, several.bundle)
    with pytest.raises(ConfigError, match="head must be a name, got 7"):
        parse_options({"head": 7}, several.bundle)


def test_of_the_shipped_model_a_named_head_is_written(several: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = several.bundle
    monkeypatch.setattr(shipped, "_shipped", lambda: (bundle.fingerprint, shipped.heads_file(bundle)))
    assert ExtractOptions().decided(bundle).classes is False
    assert ExtractOptions(head="shapes").decided(bundle).classes is True
    own = write_heads(bundle, read_heads(bundle).plus(random_head(bundle, "mine", ("a", "b"))))
    assert ExtractOptions().decided(own).classes is True  # a head of one's own means something to one's photos


def test_the_command_has_an_option(
    mixmim: Mixmim,  # noqa: F811
    several: Engine,
    few: Path,
    tmp_path: Path,
) -> None:
    words = ("--head", "colours", "--engine", "onnx")
    assert mixmim("extract", several.bundle.path, few, tmp_path / "out", *words).code == 0
    assert set(table_of(tmp_path / "out")["class"].to_pylist()) <= {*COLOURS}
