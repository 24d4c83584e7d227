"""Heads fitted to frozen features: the fit, its measures, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import HAT, client_of, files, take_out
from test_cli import Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture

from mixmim_serve.bundle import DEFAULT_BUNDLE, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.fitting.head import fit_head
from mixmim_serve.fitting.linear import FOLDS, SPLIT_FROM, best_temperature, fit_linear, folds
from mixmim_serve.fitting.photos import features_of, numbered, open_photos
from mixmim_serve.fitting.quality import BINS, calibration_error, log_loss, quality
from mixmim_serve.heads import accuracy_in_words, read_heads
from mixmim_serve.preprocess import preprocess
from mixmim_serve.sources import open_source
from mixmim_serve.sources.parts import train_and_val

GENERATOR = np.random.default_rng


def clouds(images: int, classes: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (images, 1, 6) around a point for each class, on scales that differ a thousandfold; and the labels."""
    generator = GENERATOR(seed)
    centres = GENERATOR(99).normal(size=(classes, 6))
    labels = np.arange(images) % classes
    features = (centres[labels] + spread * generator.normal(size=(images, 6))) * 10.0 ** np.arange(-1, 5) + 3
    return features[:, None].astype(np.float32), labels


def slow_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Bin by bin."""
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for number in range(BINS):
        inside = (confidence >= number / BINS) & (confidence < (number + 1) / BINS)
        if inside.any():
            accuracy = (predicted[inside] == labels[inside]).mean()
            total += inside.mean() * abs(accuracy - confidence[inside].mean())
    return 100 * total


# Measures


def test_measures_are_those_of_a_slow_computation() -> None:
    generator = GENERATOR(0)
    logits, labels = 2 * generator.normal(size=(400, 7)), generator.integers(0, 7, 400)
    powers = np.exp(logits)
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    found = quality(logits, labels)
    order = np.argsort(-logits, axis=1)
    assert found["top1"] == pytest.approx(100 * np.mean(order[:, 0] == labels))
    assert found["top5"] == pytest.approx(100 * np.mean([labels[row] in order[row, :5] for row in range(400)]))
    assert found["log_loss"] == pytest.approx(-np.log(probabilities[np.arange(400), labels]).mean(), rel=1e-5)
    assert found["ece"] == pytest.approx(slow_calibration_error(probabilities, labels), rel=1e-4)
    assert "top5" not in quality(logits[:, :5], labels % 5)


def test_a_certain_answer_counts_in_the_last_bin() -> None:
    certain, labels = np.array([[80.0, 0.0], [80.0, 0.0], [0.0, 80.0], [80.0, 0.0]]), np.array([0, 0, 1, 1])
    assert calibration_error(certain, labels) == pytest.approx(25)
    assert quality(certain, labels)["top1"] == 75


def test_the_temperature_undoes_a_factor_on_the_logits() -> None:
    generator = GENERATOR(1)
    logits = 2 * generator.normal(size=(20_000, 5))
    powers = np.exp(logits)
    shares = np.cumsum(powers / powers.sum(axis=1, keepdims=True), axis=1)
    labels = (generator.random((20_000, 1)) > shares).sum(axis=1)  # drawn from what the logits say
    assert best_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert best_temperature(4 * logits, labels) == pytest.approx(4, abs=0.12)
    assert best_temperature(logits / 3, labels) == pytest.approx(1 / 3, abs=0.01)
    assert calibration_error(4 * logits, labels) > 10 > calibration_error(logits, labels)


# The fit


def test_a_fit_finds_what_the_classes_differ_in() -> None:
    features, labels = clouds(400, 4, 0.3)
    fit = fit_linear(features, labels, 4)
    fresh, truth = clouds(400, 4, 0.3, seed=5)
    found = quality(fresh[:, 0] @ fit.weight.T + fit.bias, truth)
    nearest = np.argmin(
        np.linalg.norm((fresh[:, 0, None] - 3) / 10.0 ** np.arange(-1, 5) - GENERATOR(99).normal(size=(4, 6)), axis=2),
        axis=1,
    )
    assert found["top1"] > 100 * (nearest == truth).mean() - 3  # the best that there can be
    assert found["ece"] < 5


def test_the_fit_is_scikit_learns_on_standardised_features_with_the_chosen_penalty() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    for classes in (2, 3):
        features, labels = clouds(120, classes, 1.5)
        fit = fit_linear(features, labels, classes)
        scaled = StandardScaler().fit_transform(features[:, 0].astype(np.float64))
        model = LogisticRegression(C=1 / (fit.penalty * 120), max_iter=5000).fit(scaled, labels)
        logits = fit.temperature * (features[:, 0].astype(np.float64) @ fit.weight.T + fit.bias)
        powers = np.exp(logits)
        np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), model.predict_proba(scaled), atol=5e-3)


def test_held_out_images_choose_penalty_and_temperature() -> None:
    features, labels = clouds(150, 3, 2.5)
    fit = fit_linear(features, labels, 3)
    tried = dict(fit.sweep)
    assert tried[fit.penalty] == min(tried.values())
    assert len(tried) > 3
    assert np.array_equal(np.sort(fit.held_out), np.arange(150))
    judged = fit.held_out_logits, labels[fit.held_out]
    assert log_loss(*judged) <= tried[fit.penalty] + 1e-6
    assert best_temperature(*judged) == pytest.approx(1, abs=0.01)  # it is in them


def test_noise_is_met_with_a_strong_penalty_and_little_confidence() -> None:
    generator = GENERATOR(3)
    features, labels = generator.normal(size=(200, 1, 50)).astype(np.float32), np.arange(200) % 4
    fit = fit_linear(features, labels, 4)
    confident = np.exp(fit.held_out_logits)
    assert (confident / confident.sum(axis=1, keepdims=True)).max() < 0.5
    assert fit.penalty >= 0.3


def test_every_image_is_held_out_once_unless_there_are_many() -> None:
    labels = np.arange(103) % 3
    parts = folds(labels)
    assert len(parts) == FOLDS
    assert np.array_equal(np.sort(np.concatenate([held for _, held in parts])), np.arange(103))
    for kept, held in parts:
        assert not {*kept} & {*held}
        assert {*labels[kept]} == {*labels[held]} == {0, 1, 2}
    assert len(folds(np.array([0, 0, 0, 1, 1]))) == 2  # as many as the smallest class has images
    ((kept, held),) = folds(np.arange(SPLIT_FROM) % 4)
    assert (len(kept), len(held)) == (SPLIT_FROM * 4 // 5, SPLIT_FROM // 5)


def test_views_of_an_image_are_never_on_both_sides() -> None:
    """With a second view that gives the label away, the held-out first views are as hard as before."""
    generator = GENERATOR(4)
    labels = np.arange(120) % 2
    first = generator.normal(size=(120, 1, 8))
    features = np.concatenate([first, first], axis=1).astype(np.float32)
    fit = fit_linear(features, labels, 2)
    assert quality(np.asarray(fit.held_out_logits), labels[fit.held_out])["top1"] < 65


def test_features_must_be_finite() -> None:
    features, labels = clouds(40, 2, 1.0)
    features[3, 0, 2] = np.nan
    with pytest.raises(DataError, match="some features are inf or NaN"):
        fit_linear(features, labels, 2)


# Photos


def test_photos_are_embedded_with_their_mirror_images(engine: Engine, labelled: Path) -> None:
    photos = numbered(open_source(str(labelled / "val")))
    found = features_of(engine, photos, mirrored=True)
    assert found.values.shape == (8, 2, 64)
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert len(set(found.hashes)) == 8
    preprocessing = engine.bundle.description.preprocessing
    for row, key in enumerate(photos.source.keys):
        pixels = preprocess((labelled / "val" / key).read_bytes(), preprocessing)[None]
        expected = engine.run("encoder", {"pixels": pixels}, ["embedding"])["embedding"][0]
        np.testing.assert_allclose(found.values[row, 0], expected, atol=1e-5)
    assert features_of(engine, photos).values.shape == (8, 1, 64)
    assert features_of(engine, photos, ("embedding", "stage3")).values.shape == (8, 1, 64 + 32)


def test_the_second_view_is_mirrored(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "hat").mkdir()
    (tmp_path / "hat" / "hat.jpg").write_bytes(HAT)
    (views,) = features_of(engine, numbered(open_source(str(tmp_path))), mirrored=True).values
    pixels = preprocess(HAT, engine.bundle.description.preprocessing)
    both = np.stack([pixels, pixels[:, ::-1]])
    np.testing.assert_allclose(views, engine.run("encoder", {"pixels": both}, ["embedding"])["embedding"], atol=1e-5)
    assert np.abs(views[0] - views[1]).max() > 1e-3


def test_a_head_is_fitted_to_train_and_judged_by_val(engine: Engine, labelled: Path) -> None:
    train, val = open_photos(str(labelled))
    fitted = fit_head(engine, "colours", train, val)
    head = fitted.head
    assert (head.name, head.classes, head.inputs) == ("colours", ("blue", "red"), ("embedding",))
    assert head.about["accuracy"]["top1"] == 100
    assert head.about["accuracy"]["judged_on"] == "8 validation photos"
    assert head.about["provenance"]["images"]["count"] == 24
    assert (fitted.in_both, fitted.unreadable) == (8, ())  # the colours of val are the first of train
    without = fit_head(engine, "colours", train)
    assert without.head.about["accuracy"]["judged_on"] == "24 photos by fits without them"
    assert np.array_equal(without.head.weight, head.weight)  # val takes no part


def test_unreadable_photos_are_named_and_copies_counted(engine: Engine, labelled: Path, tmp_path: Path) -> None:
    data = shutil.copytree(labelled, tmp_path / "data")
    (data / "train" / "red" / "broken.png").write_bytes(HAT[:900])
    shutil.copy(data / "train" / "red" / "0.png", data / "val" / "red" / "again.png")
    fitted = fit_head(engine, "colours", *open_photos(str(data)))
    (sentence,) = fitted.unreadable
    assert sentence.startswith("red/broken.png: ")
    assert fitted.in_both == 9


def test_photos_that_cannot_be_learned_from(engine: Engine, labelled: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels: put the images of each class into a folder"):
        open_photos(str(photos))
    with pytest.raises(DataError, match="has only one class"):
        open_photos(str(_one_class(labelled, tmp_path)))
    (tmp_path / "val" / "green").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "green" / "0.png")
    with pytest.raises(DataError, match="has images of green, not among the 2 classes to learn"):
        open_photos(str(labelled), str(tmp_path / "val"))
    lonely = shutil.copytree(labelled / "train", tmp_path / "lonely")
    for path in sorted((lonely / "red").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"has 1 readable photo\(s\) of class red: a head needs two"):
        fit_head(engine, "colours", open_photos(str(lonely))[0])


def _one_class(labelled: Path, folder: Path) -> Path:
    shutil.copytree(labelled / "train" / "red", folder / "one" / "red")
    return folder / "one"


def test_train_and_val_are_found_beside_each_other(tmp_path: Path) -> None:
    assert train_and_val(str(tmp_path)) == (str(tmp_path), "")
    (tmp_path / "train").mkdir()
    assert train_and_val(str(tmp_path)) == (str(tmp_path / "train"), "")
    (tmp_path / "test").mkdir()
    assert train_and_val(str(tmp_path)) == (str(tmp_path / "train"), str(tmp_path / "test"))
    assert train_and_val(str(tmp_path), "other") == (str(tmp_path), "other")


# The command


def test_a_head_is_fitted_listed_made_the_default_and_removed(
    mixmim: Mixmim,  # noqa: F811
    bundle_copy: Path,
    labelled: Path,
) -> None:
    before = open_bundle(bundle_copy).fingerprint
    fitted = mixmim("head", bundle_copy, labelled, "--name", "colours", "--engine", "onnx")
    assert fitted.code == 0, fitted.err
    first, second, third = fitted.out.splitlines()
    assert first.startswith("colours, 2 classes: top-1 100.0 %, calibration error ")
    assert first.endswith("(8 validation photos)")
    assert second == f"{bundle_copy} has the heads main, colours"
    assert third == "main answers where none is named"
    listed = mixmim("head", bundle_copy).out.splitlines()
    assert listed[0] == "main (default): 3 classes, not measured"
    assert listed[1].startswith("colours: 2 classes, top-1 100.0 %")
    (line,) = mixmim("classify", bundle_copy, labelled / "val" / "red" / "1.png", "--head", "colours").lines
    assert line["classes"][0]["label"] == "red"
    assert line["classes"][0]["probability"] > 0.5
    assert mixmim("head", bundle_copy, "--name", "colours", "--default").out.endswith(
        "colours answers where none is named\n"
    )
    assert json.loads(mixmim("info", bundle_copy).out)["heads"][1]["default"] is True
    with client_of(open_engine(bundle_copy, "onnx", threads=1)) as client:
        assert client.post("/classify", files=files(HAT)).json()["head"] == "colours"
    removed = mixmim("head", bundle_copy, "--name", "colours", "--remove")
    assert removed.out.splitlines() == [f"{bundle_copy} has the heads main", "main answers where none is named"]
    bundle = open_bundle(bundle_copy)
    bundle.verify()
    assert (bundle.fingerprint, read_heads(bundle).names) == (before, ("main",))


def test_the_first_head_of_a_network_without_one_is_its_default(
    mixmim: Mixmim,  # noqa: F811
    bundle_copy: Path,
    labelled: Path,
    tmp_path: Path,
) -> None:
    take_out(bundle_copy, "head")
    assert mixmim("head", bundle_copy).out == "no head: fit one with mixmim head BUNDLE DATA --name NAME\n"
    out = tmp_path / "out"
    done = mixmim("head", bundle_copy, labelled, "--name", "colours", "--out", out, "--engine", "onnx")
    assert done.out.splitlines()[1:] == [f"{out} has the heads colours", "colours answers where none is named"]
    assert read_heads(open_bundle(bundle_copy)).names == ()
    assert accuracy_in_words(read_heads(open_bundle(out)).choose()).startswith("top-1 100.0 %")
    assert mixmim("head", out, "--name", "colours", "--remove").out == f"{out} has no head\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["DATA"], "which head? Give its name, such as --name garments"),
        (["--default"], "which head? Give its name"),
        (["--name", "colours"], "give DATA to fit a head to, or --default or --remove"),
        (["DATA", "--name", "colours", "--remove"], "give DATA to fit a head to, or --default or --remove"),
        (["DATA", "--name", "main"], "'main' cannot name a head"),
        (["--name", "main", "--remove"], "main is part of the network and cannot be removed"),
        (["--name", "none", "--remove"], "unknown head 'none': choose one of main"),
        (["--name", "none", "--default"], "unknown head 'none': choose one of main"),
        (["missing", "--name", "colours"], "missing: no such file or folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    mixmim: Mixmim,  # noqa: F811
    bundle_copy: Path,
    labelled: Path,
    words: list[str],
    sentence: str,
) -> None:
    before = {path.name: path.read_bytes() for path in bundle_copy.iterdir() if path.is_file()}
    given = [str(labelled) if word == "DATA" else word for word in words]
    assert_one_sentence(mixmim("head", bundle_copy, *given), sentence)
    assert {path.name: path.read_bytes() for path in bundle_copy.iterdir() if path.is_file()} == before


def test_shipped_and_stored_bundles_are_left_alone(mixmim: Mixmim, labelled: Path) -> None:  # noqa: F811
    for named in ("tiny", DEFAULT_BUNDLE):
        refused = mixmim("head", named, labelled, "--name", "colours")
        assert_one_sentence(refused, "is shipped or stored, and not to be changed: write a copy with --out DIR")


def test_an_altered_bundle_gets_no_head(mixmim: Mixmim, bundle_copy: Path, labelled: Path) -> None:  # noqa: F811
    (bundle_copy / "encoder.onnx").write_bytes(b"other")
    assert_one_sentence(mixmim("head", bundle_copy, labelled, "--name", "colours"), "was altered after the export")


def test_a_head_cannot_be_fitted_under_a_name_that_it_cannot_have(engine: Engine, labelled: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a head"):
        fit_head(engine, "Two Words", open_photos(str(labelled))[0])
