"""Classes among the features: only when asked for, or with a model of one's own; begun folders keep their columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from extracting import features, files_of, small
from serving import take_out
from test_cli import Mixmim, mixmim  # noqa: F401 - a fixture

from mixmim_serve import shipped
from mixmim_serve.bundle import DEFAULT_BUNDLE, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, OutputError
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.heads import read_heads

CLASSES = ["class", "probability"]


@pytest.fixture
def is_shipped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model as the one that comes with the package."""
    monkeypatch.setattr(shipped, "_shipped", lambda: (engine.bundle.fingerprint, ""))


def columns(folder: Path) -> list[str]:
    """The columns of every shard of a folder."""
    (names,) = {tuple(pq.read_schema(path).names) for path in (folder / "features").glob("*.parquet")}
    return list(names)


def extracted(engine: Engine, photos: Path, out: Path, classes: bool | None = None) -> list[str]:
    """The columns that a run writes."""
    assert features(small(engine, photos, out, options=ExtractOptions(batch=4, classes=classes)), engine).complete
    return columns(out)


def test_the_shipped_model_is_known_by_its_fingerprint() -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    assert read_heads(bundle).names
    assert ExtractOptions().decided(bundle).classes is False
    assert ExtractOptions(classes=True).decided(bundle).classes is True
    assert ExtractOptions(head=read_heads(bundle).default).decided(bundle).classes is True
    assert not shipped.is_shipped(dataclasses.replace(bundle, fingerprint="0" * 32))
    assert shipped.is_shipped(dataclasses.replace(bundle, path=Path("/elsewhere"), name="mine"))


def test_a_model_of_ones_own_writes_classes(engine: Engine, photos: Path, tmp_path: Path) -> None:
    assert extracted(engine, photos, tmp_path / "out")[2:4] == CLASSES
    assert not {*CLASSES} & {*extracted(engine, photos, tmp_path / "without", classes=False)}


@pytest.mark.usefixtures("is_shipped")
def test_the_shipped_model_writes_them_when_asked(engine: Engine, photos: Path, tmp_path: Path) -> None:
    assert extracted(engine, photos, tmp_path / "out") == ["key", "embedding", "width", "height", "sha256"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["classes"] is False
    assert extracted(engine, photos, tmp_path / "with", classes=True)[2:4] == CLASSES


@pytest.mark.usefixtures("is_shipped")
@pytest.mark.parametrize("recorded", [True, False], ids=["this version", "an older one"])
def test_a_begun_folder_keeps_its_columns(engine: Engine, photos: Path, tmp_path: Path, recorded: bool) -> None:
    out = tmp_path / "out"
    job = small(engine, photos, out, images=5, options=ExtractOptions(batch=4, classes=True))
    features(job, engine)
    before = files_of(out / "features")
    if not recorded:  # as older versions wrote it, with classes whenever there was a head
        manifest = json.loads((out / "manifest.json").read_text())
        del manifest["options"]["classes"], manifest["model_fingerprint"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "features" / "000002.parquet").unlink()
    features(small(engine, photos, out, images=5), engine)
    assert files_of(out / "features") == before
    without = small(engine, photos, out, images=5, options=ExtractOptions(batch=4, classes=False))
    with pytest.raises(OutputError, match=r"was started with other options \(classes True\)"):
        features(without, engine)


def test_a_model_without_a_head_has_none(bundle_copy: Path, photos: Path, tmp_path: Path) -> None:
    engine = open_engine(take_out(bundle_copy, "head"), "onnx", threads=1)
    assert not {*CLASSES} & {*extracted(engine, photos, tmp_path / "out")}
    with pytest.raises(ConfigError, match="no classification head: extract without classes"):
        extracted(engine, photos, tmp_path / "other", classes=True)


@pytest.mark.usefixtures("is_shipped")
@pytest.mark.parametrize("words", [["--classes"], ["--set", "options.classes=true"]])
def test_the_command_has_an_option(
    mixmim: Mixmim,  # noqa: F811
    exported_bundle: Path,
    photos: Path,
    tmp_path: Path,
    words: list[str],
) -> None:
    assert mixmim("extract", exported_bundle, photos, tmp_path / "out", "--engine", "onnx", *words).code == 0
    assert columns(tmp_path / "out")[2:4] == CLASSES
    assert mixmim("extract", exported_bundle, photos, tmp_path / "not", "--engine", "onnx").code == 0
    assert not {*CLASSES} & {*columns(tmp_path / "not")}
    refused = mixmim("extract", exported_bundle, photos, tmp_path / "x", "--set", "options.classes=maybe")
    assert "options.classes must be true or false, got 'maybe'" in refused.err
