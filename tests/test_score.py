"""`mixmim score`: the numbers of POST /score, and a warning wherever they are explained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.numpy import load_file
from serving import HAT, IDENTITY, PHOTOS, client_of, files, take_out
from test_cli import Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture
from typer.testing import CliRunner

from mixmim_serve.cli import app
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.preprocess import preprocess
from mixmim_serve.tasks import partner_of, score_image


@pytest.mark.parametrize("masks", [2, 3])
def test_it_prints_what_the_route_answers(
    mixmim: Mixmim,  # noqa: F811
    engine: Engine,
    exported_bundle: Path,
    masks: int,
) -> None:
    paths = [PHOTOS["hat"], PHOTOS["shoes"]]
    outcome = mixmim("score", exported_bundle, *paths, "--masks", masks, "--map", "--engine", "onnx")
    assert (outcome.code, outcome.err) == (0, "")
    with client_of(engine) as client:
        images = files(*(path.read_bytes() for path in paths))
        body = client.post(f"/score?masks={masks}&map=true", files=images).json()
    for line, path, expected in zip(outcome.lines, paths, body["data"], strict=True):
        assert line["path"] == str(path)
        assert line["score"] == pytest.approx(expected["score"], rel=1e-4)
        np.testing.assert_allclose(line["map"], expected["map"], rtol=1e-4)
        assert {key: line[key] for key in IDENTITY} == {key: body[key] for key in IDENTITY}
    (short,) = mixmim("score", exported_bundle, PHOTOS["hat"], "--engine", "onnx").lines
    assert short.keys() == {"path", "score"} | IDENTITY


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_scored(
    mixmim: Mixmim,  # noqa: F811
    exported_bundle: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(HAT)
    outcome = mixmim("score", exported_bundle, tmp_path)
    assert (outcome.code, [line["path"] for line in outcome.lines]) == (1, [str(tmp_path / "b.jpg")])
    assert outcome.err.startswith(f"mixmim: {tmp_path / 'a.jpg'}: ")
    assert outcome.err.endswith("mixmim: 1 of 2 images could not be read and were skipped\n")


def test_a_model_without_a_decoder_is_refused(mixmim: Mixmim, bundle_copy: Path) -> None:  # noqa: F811
    assert_one_sentence(mixmim("score", take_out(bundle_copy, "decoder"), PHOTOS["hat"]), "this model has no decoder")


def test_an_engine_with_a_small_largest_batch_gives_the_same(engine: Engine, exported_bundle: Path) -> None:
    pixels = preprocess(HAT, engine.bundle.description.preprocessing)
    partner = partner_of(load_file(exported_bundle / "golden.safetensors"))
    limited = open_engine(exported_bundle, "onnx", threads=1)
    limited.max_batch = 3
    np.testing.assert_allclose(
        score_image(limited, pixels, partner, 4), score_image(engine, pixels, partner, 4), rtol=1e-4
    )


def test_help_page_and_document_say_where_scores_mislead() -> None:
    help_ = " ".join(CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "120"}).output.split())
    assert "A high score is not a defect" in help_
    document = json.loads((REPOSITORY / "docs" / "openapi.json").read_text())
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    for text in (document["paths"]["/score"]["post"]["description"], page):
        assert {"0.40", "0.87"} <= set(re.findall(r"\d\.\d+", text))
    assert "## What a score says" in page
    assert "#what-a-score-says" in help_


def test_the_example_of_the_page_finds_the_odd_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code runs as it stands, over folders of features as `mixmim extract` writes them."""
    section = (REPOSITORY / "docs" / "serving.md").read_text().split("## What a score says")[1]
    lines = re.findall(r"^    (?!mixmim)(.*)$", section.split("\n## ")[0], re.MULTILINE)
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(40, 4, 2, 2)).astype(np.float32) + 5
    defect = normal[:1].copy()
    defect[:, :, 1, 0] *= -1  # in one place only
    for name, maps in (("intact", normal), ("new", np.concatenate([normal[:3] + 0.1, defect]))):
        (tmp_path / name / "features").mkdir(parents=True)
        np.save(tmp_path / name / "features" / "000000.npy", maps.mean((2, 3)))
        np.save(tmp_path / name / "features" / "000000.stage4.npy", maps.reshape(len(maps), -1))
    monkeypatch.chdir(tmp_path)
    found: dict[str, np.ndarray] = {}
    exec("\n".join(lines), found)  # noqa: S102 - the page is ours
    assert (found["unusual"].shape, found["unusual"].argmax()) == ((4,), 3)
