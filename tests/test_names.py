"""What a model is called, and that its two fingerprints are told apart, wherever either is shown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extracting import features, small
from serving import HAT, MODEL, client_of, files, refusal, url_of

from mixmim_serve.bundle import DEFAULT_BUNDLE, MAX_NAME, folder_name, open_bundle
from mixmim_serve.client import Client
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.errors import BundleError, OutputError
from mixmim_serve.explore.pages import gallery
from mixmim_serve.extract.features import FeatureFolder, embed_query
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.manifest import made_by, read_manifest
from mixmim_serve.publish.card import model_card


def alter(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the content of a bundle's config.json."""
    values = json.loads((bundle / "config.json").read_text())
    change(values)
    (bundle / "config.json").write_text(json.dumps(values))
    return bundle


@pytest.fixture
def shoes(bundle_copy: Path) -> Path:
    """The same weights under the name of shoes."""
    return alter(bundle_copy, lambda values: values.update(name="shoes"))


def test_a_bundle_is_named_after_the_folder_of_its_export(exported_bundle: Path, bundle_copy: Path) -> None:
    assert open_bundle(exported_bundle).name == MODEL
    assert open_bundle(bundle_copy).name == MODEL  # in another folder, its name stays


def test_an_old_bundle_has_the_name_of_its_folder(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(bundle_copy, lambda values: values.pop("name"))
    assert open_bundle(bundle_copy).name == "bundle"
    monkeypatch.chdir(bundle_copy)
    assert open_bundle(Path()).name == "bundle"
    link = bundle_copy.parent / "current"
    link.symlink_to(bundle_copy)
    assert open_bundle(link).name == "current"
    assert "name" not in json.loads((DEFAULT_BUNDLE / "config.json").read_text())
    assert open_bundle(DEFAULT_BUNDLE).name == "tiny"


def test_the_name_changes_no_number(shoes: Path, exported_bundle: Path) -> None:
    named, before = open_bundle(shoes), open_bundle(exported_bundle)
    named.verify()
    assert (named.fingerprint, named.content) == (before.fingerprint, before.content)


@pytest.mark.parametrize("name", ["", " shoes", "a\nb", "a\x1b[2J", "x" * (MAX_NAME + 1), 3, None, ["shoes"]])
def test_a_name_that_could_spoil_a_terminal_is_refused(bundle_copy: Path, name: object) -> None:
    alter(bundle_copy, lambda values: values.update(name=name))
    with pytest.raises(BundleError, match=r"config\.json is damaged"):
        open_bundle(bundle_copy)


def test_a_folder_of_any_name_gives_a_name() -> None:
    assert folder_name(Path("/bundles/größe 39")) == "größe 39"
    assert folder_name(Path("/bundles/a\nb\udcff")) == "a_b_"  # bytes that are not UTF-8, which JSON cannot hold
    assert len(folder_name(Path("/x" * 9 + "y" * 200))) == MAX_NAME
    assert folder_name(Path("/")) == "model"


def test_every_answer_has_the_name_and_both_fingerprints(shoes: Path) -> None:
    engine = open_engine(shoes, "onnx", threads=1)
    expected = {
        "model": "shoes",
        "fingerprint": engine_fingerprint(engine),
        "model_fingerprint": engine.bundle.fingerprint,
    }
    assert expected["fingerprint"] != expected["model_fingerprint"]
    with client_of(engine) as client:
        listed = client.get("/v1/models").json()["data"][0]
        for body in (
            client.post("/embed", files=files(HAT)).json(),
            client.post("/classify", files=files(HAT, HAT)).json(),
            client.post("/score", files=files(HAT)).json(),
            client.get("/model").json(),
            listed | {"model": listed["id"]},
        ):
            assert expected.items() <= body.items()
        for name in expected.values():  # as an OpenAI client may call it
            assert client.get(f"/v1/models/{name}").json() == listed
        assert refusal(client.get("/v1/models/custom"))[:2] == (404, "unknown model 'custom': this server has 'shoes'.")
        exposition = client.get("/metrics").text
    assert f'model="shoes",model_fingerprint="{expected["model_fingerprint"]}"' in exposition


def test_results_of_our_client_have_both(engine: Engine) -> None:
    with url_of(engine) as (url, _), Client(url) as client:
        found = [client.embed(HAT), client.score(HAT), client.model()]
    assert {(each.model, each.fingerprint, each.model_fingerprint) for each in found} == {
        (MODEL, engine_fingerprint(engine), engine.bundle.fingerprint)
    }


def test_features_of_another_model_are_refused_by_both_names(
    engine: Engine, photos: Path, tmp_path: Path, shoes: Path
) -> None:
    features(small(engine, photos, tmp_path / "out"), engine)
    other = open_engine(shoes, "onnx", threads=1)
    other.bundle = dataclasses.replace(other.bundle, fingerprint="ab" * 16)
    ours = f"small (model fingerprint {engine.bundle.fingerprint[:8]}) on onnx-cpu in fp32 (engine fingerprint "
    with pytest.raises(OutputError) as refused:
        features(small(other, photos, tmp_path / "out"), other)
    assert f"has features of {ours}" in str(refused.value)
    assert "not of shoes (model fingerprint abababab) on onnx-cpu in fp32" in str(refused.value)
    manifest = read_manifest(Folder(tmp_path / "out"))
    assert (manifest["model"], manifest["model_fingerprint"]) == (MODEL, engine.bundle.fingerprint)
    with pytest.raises(OutputError, match=r"did not make these features, but small .* with --bundle"):
        embed_query(manifest | {"fingerprint": "0" * 32}, b"", shoes)


def test_a_manifest_of_an_older_version_is_described_without_what_it_lacks(
    engine: Engine, photos: Path, tmp_path: Path
) -> None:
    features(small(engine, photos, tmp_path / "out"), engine)
    opened = FeatureFolder(tmp_path / "out")
    assert opened.model == f"small, model fingerprint {engine.bundle.fingerprint[:8]}"
    opened.manifest = {key: value for key, value in opened.manifest.items() if key != "model_fingerprint"}
    opened.manifest["model"] = "tiny"
    assert made_by(opened.manifest).startswith("tiny on onnx-cpu in fp32 (engine fingerprint ")
    assert opened.model == "tiny"
    assert "Photos &lt;b&gt;" in gallery("Photos <b>", [])  # as a name may be


def test_a_renamed_bundle_goes_on_with_its_features(engine: Engine, photos: Path, tmp_path: Path, shoes: Path) -> None:
    before = features(small(engine, photos, tmp_path / "out"), engine)
    renamed = open_engine(shoes, "onnx", threads=1)
    assert features(small(renamed, photos, tmp_path / "out"), renamed).rows == before.rows
    query = embed_query(read_manifest(Folder(tmp_path / "out")), HAT, shoes)
    assert np.isfinite(query).all()


def test_the_card_names_the_model(shoes: Path) -> None:
    bundle = open_bundle(shoes)
    card = model_card(bundle, "me/shoes")
    assert "| name | shoes |" in card
    assert f"| model fingerprint | `{bundle.fingerprint}` |" in card


def test_a_copy_keeps_the_name(shoes: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert open_bundle(shoes).copy(tmp_path / "elsewhere").name == "shoes"
    shutil.rmtree(shoes)
    assert open_bundle(tmp_path / "elsewhere").name == "shoes"
