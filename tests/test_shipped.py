"""Features of a shipped model that a release replaced: one sentence says what changed and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from extracting import features, small
from serving import HAT

from mixmim_serve import shipped
from mixmim_serve.engines import Engine, engine_fingerprint
from mixmim_serve.engines.base import combined_fingerprint
from mixmim_serve.errors import OutputError
from mixmim_serve.extract.features import embed_query

OLD = shipped.EARLIER[0]
ADVICE = (
    "the package shipped that model until it was replaced by a better one (model fingerprint 11111111), and vectors of "
    "the two do not compare: extract again into another folder, or keep the bundle `tiny` of the earlier release and "
    "name its folder"
)


@pytest.fixture
def replaced(engine: Engine, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of features whose manifest names the earlier shipped model, in a package that ships another one."""
    monkeypatch.setattr(shipped, "_shipped", lambda: ("1" * 32, ""))
    out = tmp_path / "out"
    features(small(engine, photos, out), engine)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["fingerprint"] = combined_fingerprint(OLD, engine.name, engine.precision)
    manifest["model"], manifest["model_fingerprint"] = "tiny", OLD
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_an_engine_fingerprint_is_known_without_the_engine(engine: Engine) -> None:
    parts = engine.bundle.fingerprint, engine.name, engine.precision
    assert combined_fingerprint(*parts) == engine_fingerprint(engine)


@pytest.mark.parametrize("recorded", [True, False], ids=["this version", "an older one"])
def test_a_query_says_what_changed_and_what_to_do(engine: Engine, replaced: Path, recorded: bool) -> None:
    manifest = json.loads((replaced / "manifest.json").read_text())
    if not recorded:  # older versions did not record the model fingerprint
        del manifest["model_fingerprint"]
    with pytest.raises(OutputError) as caught:
        embed_query(manifest, HAT)
    assert "did not make these features, but tiny" in str(caught.value)
    assert str(caught.value).endswith(f": {ADVICE} with --bundle.")


def test_a_run_that_goes_on_says_it_too(engine: Engine, photos: Path, replaced: Path) -> None:
    with pytest.raises(OutputError) as caught:
        features(small(engine, photos, replaced), engine)
    assert "has features of tiny (model fingerprint 1fb760df)" in str(caught.value)
    assert str(caught.value).endswith(f": {ADVICE}.")


def test_other_models_get_the_usual_advice(engine: Engine, replaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((replaced / "manifest.json").read_text())
    with pytest.raises(OutputError, match=r"name their bundle with --bundle\.$"):
        embed_query(manifest | {"fingerprint": "0" * 32}, HAT)
    monkeypatch.setattr(shipped, "_shipped", lambda: (OLD, ""))  # while it is still the shipped one
    with pytest.raises(OutputError, match=r": name their bundle with --bundle\.$"):
        embed_query(manifest, HAT)
    monkeypatch.setattr(shipped, "_shipped", lambda: ("", ""))  # a package that leaves the bundle out
    assert shipped.earlier_advice(manifest) == ""
