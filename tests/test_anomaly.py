"""Alarms: patches, coreset, thresholds, calibrations in bundles, the detector. The slow way beside the fast one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from anomalies import ODD, calibrated_bundle, normal_photos, write_photos  # noqa: F401 - fixtures
from safetensors.numpy import load_file, save_file

from mixmim_serve.anomaly import calibrate as calibrating
from mixmim_serve.anomaly.calibrate import Options, calibrate, evenly
from mixmim_serve.anomaly.calibration import abouts, files, open_calibration, store
from mixmim_serve.anomaly.coreset import coreset
from mixmim_serve.anomaly.detector import Detector, open_detector
from mixmim_serve.anomaly.heatmap import overlay, overlay_name, strength
from mixmim_serve.anomaly.memory import Memory
from mixmim_serve.anomaly.nearest import References
from mixmim_serve.anomaly.patches import STAGE, patch_features, whitening
from mixmim_serve.anomaly.photos import run_photos
from mixmim_serve.anomaly.rates import Share, caution, check_rate, percentiles, threshold
from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.errors import BundleError, ConfigError, DataError
from mixmim_serve.publish.card import model_card
from mixmim_serve.sources import open_source

RNG = np.random.default_rng(0)


# ---- patches ----


def test_patches_are_the_places_of_a_map() -> None:
    maps = RNG.normal(size=(2, 5, 3, 4)).astype(np.float16)
    features = patch_features({"stage4": maps})
    assert (features.shape, features.dtype) == ((2, 3, 4, 5), np.float32)
    np.testing.assert_array_equal(features[1, 2, 0], maps[1, :, 2, 0])


def test_whitened_vectors_have_unit_variance_and_keep_the_directions_of_the_largest() -> None:
    vectors = (RNG.normal(size=(4000, 5)) * [1, 10, 0.1, 3, 5] + 7).astype(np.float32)
    white = whitening(vectors, 3, shrink=0)(vectors)
    assert white.shape == (4000, 3)
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-2)
    correlated = np.abs(np.corrcoef(vectors.T, white.T)[:5, 5:])
    assert set(correlated.argmax(0)) == {1, 3, 4}


# ---- references ----


@pytest.mark.parametrize("block", [7, 10**6])
def test_nearest_references_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("mixmim_serve.anomaly.nearest.BLOCK", block)
    known, queries = (RNG.normal(size=(n, 6)).astype(np.float32) for n in (40, 23))
    every = np.linalg.norm(queries[:, None] - known, axis=2)
    distances, indices = References(known).nearest(queries)
    np.testing.assert_array_equal(indices, every.argmin(1))
    np.testing.assert_allclose(distances, every.min(1), rtol=1e-5)
    np.testing.assert_allclose(References(known).mean_distance(queries, 3), np.sort(every)[:, :3].mean(1), rtol=1e-5)
    np.testing.assert_allclose(References(known[:2]).mean_distance(queries, 3), every[:, :2].mean(1), rtol=1e-5)
    assert (References(known).nearest(known)[0] == 0).all()


def test_the_weight_is_that_of_patchcore() -> None:
    patches, embeddings = (RNG.normal(size=size).astype(np.float32) for size in ((20, 1, 2, 6), (20, 4)))
    memory = Memory.of(patches, embeddings, 100)
    known, query = patches.reshape(-1, 6), RNG.normal(size=(7, 6)).astype(np.float32)
    for patch, weighted in zip(query, memory.weighted(query), strict=True):
        to_all = np.linalg.norm(known - patch, axis=1)
        nearest = to_all.argmin()
        around = np.argsort(np.linalg.norm(known - known[nearest], axis=1))[:9]
        weight = 1 - np.exp(to_all[nearest]) / np.exp(to_all[around]).sum()
        assert weighted == pytest.approx(weight * to_all[nearest], rel=1e-4)


def test_a_patch_far_from_all_has_a_finite_distance() -> None:
    memory = Memory.of(RNG.normal(size=(20, 1, 1, 3)).astype(np.float32), np.eye(20, 4, dtype=np.float32), 100)
    assert np.isfinite(memory.weighted(np.full((1, 3), 1e6, np.float32))).all()


def test_distances_of_a_photo_are_those_of_its_farthest_places_and_of_its_embedding() -> None:
    patches, embeddings = (RNG.normal(size=size).astype(np.float32) for size in ((30, 2, 4, 5), (30, 4)))
    memory = Memory.of(patches, embeddings, 1000)
    found = memory.distances(patches[:3] + 1, embeddings[:3] + 1)
    np.testing.assert_allclose(
        found.places.reshape(3, 8), memory.weighted((patches[:3] + 1).reshape(-1, 5)).reshape(3, 8)
    )
    np.testing.assert_allclose(found.parts[:, 0], np.sort(found.places.reshape(3, 8))[:, -2:].mean(1), rtol=1e-6)
    every = np.linalg.norm(memory.whiten(embeddings[:3] + 1)[:, None] - memory.whiten(embeddings), axis=2)
    np.testing.assert_allclose(found.parts[:, 1], np.sort(every)[:, :3].mean(1), rtol=1e-4)


def test_a_coreset_covers_better_than_chance() -> None:
    """One dense cluster and a few far points: greedy k-center keeps the far ones, chance keeps the cluster."""
    vectors = RNG.normal(size=(1000, 8)).astype(np.float32)
    vectors[:10] += 50 * np.eye(10, 8, dtype=np.float32)
    kept = coreset(vectors, 40)
    assert len(set(kept.tolist())) == 40
    assert set(range(8)) <= set(kept.tolist())
    farthest = References(vectors[kept]).nearest(vectors)[0].max()
    by_chance = References(vectors[np.random.default_rng(1).permutation(1000)[:40]]).nearest(vectors)[0].max()
    assert farthest < by_chance / 3
    np.testing.assert_array_equal(coreset(vectors, 40), kept)  # a function of the seed
    assert not np.array_equal(coreset(vectors, 40, seed=1), kept)
    np.testing.assert_array_equal(coreset(vectors, 1000), np.arange(1000))


def test_a_coreset_of_very_many_vectors_is_chosen_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.anomaly.coreset.POOL", 50)
    kept = coreset(RNG.normal(size=(300, 3)).astype(np.float32), 20)
    assert len(set(kept.tolist())) == 20
    assert kept.max() > 100
    assert len(set(coreset(RNG.normal(size=(300, 3)).astype(np.float32), 80).tolist())) == 80


def test_a_coreset_of_equal_vectors_keeps_different_ones() -> None:
    assert len(set(coreset(np.ones((50, 4), np.float32), 10).tolist())) == 10


# ---- rates ----


@pytest.mark.parametrize(("photos", "rate"), [(500, 0.01), (200, 0.05), (60, 0.1)])
def test_a_threshold_keeps_the_rate_of_false_alarms(photos: int, rate: float) -> None:
    rng, beyond = np.random.default_rng(3), []
    for _ in range(400):
        normal = np.sort(rng.exponential(size=photos))
        beyond.append(np.exp(-threshold(normal, rate)))  # probability of a new one above it
    assert np.mean(beyond) <= rate * 1.1
    assert np.mean(beyond) >= rate / 2


def test_few_photos_take_the_largest_score() -> None:
    assert threshold(np.arange(60, dtype=np.float32), 0.01) == 59
    assert threshold(np.arange(99, dtype=np.float32), 0.01) == 98
    assert threshold(np.arange(199, dtype=np.float32), 0.01) == 197


def test_percentiles_are_shares_of_lower_scores() -> None:
    assert percentiles(np.arange(4, dtype=np.float32), np.array([-1, 0, 0.5, 9], np.float32)).tolist() == [
        0,
        0,
        25,
        100,
    ]


def test_the_interval_holds_the_true_share() -> None:
    draws = np.random.default_rng(0).binomial(100, 0.03, 2000)
    inside = [low <= 0.03 <= high for low, high in (Share(int(count), 100).interval for count in draws)]
    assert 0.9 < np.mean(inside) < 1
    assert Share(0, 100).interval[0] == 0
    assert str(Share(1, 100)) == "1 of 100: 1.0 % (95 % interval 0.2 % to 5.4 %)"


def test_few_photos_are_told_apart_from_enough() -> None:
    assert caution(500, 0.01) == ""
    assert caution(100, 0.01).startswith("100 photos say little of a rate of 1.0 %")
    assert "may be 3.7 %; use 500 or more" in caution(100, 0.01)


@pytest.mark.parametrize("rate", [0, -0.1, 0.6, float("nan")])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="a false-alarm rate must be above 0"):
        check_rate(rate)


# ---- a calibration ----


@pytest.fixture(scope="module")
def engine(calibrated_bundle: Path) -> Engine:  # noqa: F811
    return open_engine(calibrated_bundle, "onnx")


@pytest.fixture
def copied(calibrated_bundle: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(calibrated_bundle, tmp_path / "small"))


def test_it_changes_no_fingerprint_and_is_part_of_the_bundle(
    exported_bundle: Path,
    calibrated_bundle: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    before, after = open_bundle(exported_bundle), open_bundle(calibrated_bundle)
    after.verify()
    assert after.fingerprint == before.fingerprint
    assert files(before) == []
    (name,) = files(after)
    assert set(after.checksums) == {*before.checksums, name}
    tmp_path.joinpath("copy").mkdir()
    assert files(after.copy(tmp_path / "copy")) == [name]
    assert abouts(after)[0].photos == 60
    assert "| calibrated for alarms | onnx-cpu fp32 on 60 normal photos |" in model_card(after, "me/small")
    assert "calibrated" not in model_card(before, "me/small")


def test_a_new_one_replaces_the_old_one_of_its_engine_only(copied: Path, engine: Engine) -> None:
    bundle, calibration = open_bundle(copied), open_calibration(engine)
    (old,) = files(bundle)
    about = dataclasses.replace(calibration.about, fingerprint="0" * 32, engine="another")
    bundle = store(bundle, dataclasses.replace(calibration, about=about))
    assert len(files(bundle)) == 2
    about = dataclasses.replace(calibration.about, rate=0.2)
    bundle = store(bundle, dataclasses.replace(calibration, about=about))
    bundle.verify()
    assert len(files(bundle)) == 2
    assert not (copied / old).exists()
    assert {about.rate for about in abouts(bundle)} == {0.01, 0.2}


def test_it_reads_what_was_written(engine: Engine, copied: Path) -> None:
    calibration = open_calibration(engine)
    again = open_calibration(open_engine(store(open_bundle(copied), calibration), "onnx"))
    assert again.about == calibration.about
    for name, array in calibration.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)


def test_a_kill_before_the_new_config_leaves_the_old_calibration(
    copied: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = open_calibration(engine)
    about = dataclasses.replace(calibration.about, rate=0.2)
    monkeypatch.setattr("mixmim_serve.bundle.Bundle.save_config", lambda bundle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store(open_bundle(copied), dataclasses.replace(calibration, about=about))
    assert open_detector(open_engine(copied, "onnx")).rate == 0.01  # and the bundle verifies


def test_without_one_the_sentence_says_what_to_do(exported_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"^this bundle is not calibrated: run mixmim calibrate BUNDLE NORMAL_PHOTOS"):
        open_detector(open_engine(exported_bundle, "onnx"))


def test_one_for_another_engine_is_refused_by_name(calibrated_bundle: Path) -> None:  # noqa: F811
    other = open_engine(calibrated_bundle, "openvino", "fp32")
    with pytest.raises(BundleError, match=r"was calibrated for onnx-cpu fp32, but openvino-cpu fp32 runs it"):
        open_detector(other)


def test_one_of_another_model_is_refused(copied: Path, engine: Engine) -> None:
    calibration = open_calibration(engine)
    about = dataclasses.replace(calibration.about, model_fingerprint="f" * 32)
    foreign = dataclasses.replace(calibration, about=about)
    with pytest.raises(BundleError, match=f"is of model fingerprint {'f' * 32}, the bundle has"):
        store(open_bundle(copied), foreign)
    (name,) = files(open_bundle(copied))
    rewrite(copied, name, {"model_fingerprint": "f" * 32})
    with pytest.raises(BundleError, match=f"is of model fingerprint {'f' * 32}, the bundle has"):
        open_detector(dataclass_engine(copied, engine))


@pytest.mark.parametrize("values", [{"format": 9}, {"stage": None, "photos": None, "odd": 1}, {"unknown": 1}])
def test_a_damaged_one_is_refused(copied: Path, engine: Engine, values: dict[str, object]) -> None:
    (name,) = files(open_bundle(copied))
    rewrite(copied, name, values)
    with pytest.raises(BundleError, match=r"cannot be read .*: run mixmim calibrate again"):
        open_detector(dataclass_engine(copied, engine))


def test_arrays_that_do_not_belong_together_are_refused(copied: Path, engine: Engine) -> None:
    (name,) = files(open_bundle(copied))
    rewrite(copied, name, {}, {"patches.around": np.full((200, 9), 200, np.int32)})
    with pytest.raises(BundleError, match="do not belong together"):
        open_detector(dataclass_engine(copied, engine))


@pytest.mark.parametrize(
    ("values", "arrays"),
    [
        ({}, {"patches.around": np.zeros((200, 9), np.float32)}),
        ({}, {"normal.parts": np.zeros((0, 2), np.float32), "normal.folds": np.zeros(0, np.float32)}),
        ({}, {"normal.places": np.full(4, np.nan, np.float32)}),
        ({}, {"normal.places": np.zeros(3, np.float32)}),
        ({"stage": "logits"}, {}),
        ({"rate": "0.01"}, {}),
    ],
)
def test_what_no_calibration_writes_is_refused_when_it_is_opened(
    copied: Path, engine: Engine, values: dict[str, object], arrays: dict[str, np.ndarray]
) -> None:
    """And not with a traceback later, in the middle of a request."""
    (name,) = files(open_bundle(copied))
    rewrite(copied, name, values, arrays)
    with pytest.raises(BundleError, match=r"cannot be read .*: run mixmim calibrate again"):
        open_detector(dataclass_engine(copied, engine))


class FakeEngine:
    """An engine by name only, of a folder that `open_engine` would refuse."""

    def __init__(self, folder: Path, like: Engine) -> None:
        self.bundle, self.name, self.precision = open_bundle(folder), like.name, like.precision


def dataclass_engine(folder: Path, like: Engine) -> Engine:
    engine: Engine = FakeEngine(folder, like)  # type: ignore[assignment]
    return engine


def rewrite(folder: Path, name: str, values: dict[str, object], arrays: dict[str, np.ndarray] | None = None) -> None:
    """Change a calibration's JSON or arrays, as somebody with write access could."""
    from safetensors import safe_open

    with safe_open(folder / name, framework="np") as file:
        text = json.loads(file.metadata()["mixmim"]) | values
    save_file(load_file(folder / name) | (arrays or {}), folder / name, {"mixmim": json.dumps(text)})


# ---- calibrating ----


def test_fewer_than_fifty_photos_are_refused(engine: Engine, tmp_path: Path) -> None:
    few = open_source(write_photos(tmp_path / "few", 49))
    with pytest.raises(DataError, match=r"has 49 readable photos, a calibration needs at least 50: add normal photos"):
        calibrate(engine, few, Options())
    write_photos(tmp_path / "some", 50)
    (tmp_path / "some" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="has 49 readable photos"):
        calibrate(engine, open_source(tmp_path / "some"), Options())


def test_no_photo_is_scored_against_itself(engine: Engine) -> None:
    """Against all photos, their own included, every distance would be 0 or nearly."""
    calibration = open_calibration(engine)
    assert calibration.parts.min() > 0
    embeddings = calibration.memory.embeddings
    with_itself = embeddings.nearest(embeddings.vectors)[0]
    assert with_itself.max() == 0
    assert sorted(np.unique(calibration.folds, return_counts=True)[1].tolist()) == [3] * 20


def test_each_fold_is_measured_by_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, embeddings = RNG.normal(size=(20, 2, 2, 3)).astype(np.float32), np.eye(20, 4, dtype=np.float32)
    seen = []
    of = Memory.of

    def record(patches_NHWK: np.ndarray, *arguments: object) -> Memory:
        seen.append({row.tobytes() for row in patches_NHWK})
        return of(patches_NHWK, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Memory, "of", record)
    folds = np.arange(20) % 5
    calibrating._held_out(patches, embeddings, folds, Options(patches=10))
    for fold, photos in enumerate(seen):
        assert photos == {row.tobytes() for row in patches[folds != fold]}


def test_the_patches_of_many_photos_are_whitened_by_the_first(
    engine: Engine,
    normal_photos: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(normal_photos)
    whole, _ = calibrate(engine, source, Options(patches=200))
    monkeypatch.setattr(calibrating, "FIRST", 32)
    streamed, _ = calibrate(engine, source, Options(patches=200))
    assert streamed.parts.shape == whole.parts.shape
    assert not np.array_equal(streamed.whiten.mean, whole.whiten.mean)
    features = patch_features(next(run_photos(engine, source, [STAGE])).outputs)
    np.testing.assert_allclose(streamed.whiten.mean, features.reshape(-1, features.shape[-1]).mean(0), atol=1e-4)


def test_many_photos_are_drawn_evenly(engine: Engine, normal_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(calibrating, "MOST", 55)
    assert calibrate(engine, open_source(normal_photos), Options(patches=50))[0].about.photos == 55
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(0, 4) == []


@pytest.mark.parametrize(
    ("values", "sentence"), [({"patches": 0}, "needs 1 patch or more"), ({"rate": 1}, "rate must")]
)
def test_wrong_options_are_refused(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Options(**values)  # type: ignore[arg-type]


# ---- the detector ----


def verdicts_of(detector: Detector, engine: Engine, folder: Path) -> list[object]:
    groups = run_photos(engine, open_source(folder), detector.outputs)
    return [verdict for group in groups for verdict in detector.verdicts(group.outputs)]


def test_odd_photos_are_found_and_their_place_too(engine: Engine, tmp_path: Path) -> None:
    detector = open_detector(engine, 0.1)
    good = verdicts_of(detector, engine, write_photos(tmp_path / "good", 30, seed=5))
    bad = verdicts_of(detector, engine, write_photos(tmp_path / "bad", ODD, odd=True))
    assert sum(not verdict.normal for verdict in good) <= 9  # of 30, at a rate of 10 %: three expected
    assert all(not verdict.normal for verdict in bad)
    assert min(verdict.percentile for verdict in bad) == 100
    assert min(verdict.score for verdict in bad) > np.median([verdict.score for verdict in good])
    assert bad[0].places.shape == (2, 2)
    assert bad[0].threshold == detector.threshold


def test_a_verdict_does_not_depend_on_the_others_of_its_batch(engine: Engine, tmp_path: Path) -> None:
    detector = open_detector(engine)
    folder = write_photos(tmp_path / "photos", 5, odd=True)
    together = verdicts_of(detector, engine, folder)
    (outputs,) = (group.outputs for group in run_photos(engine, open_source(folder), detector.outputs))
    alone = [detector.verdicts({name: array[row : row + 1] for name, array in outputs.items()})[0] for row in range(5)]
    np.testing.assert_allclose([each.score for each in alone], [each.score for each in together], rtol=1e-4)


def test_the_rate_moves_the_threshold_and_the_check(engine: Engine) -> None:
    strict, loose = open_detector(engine), open_detector(engine, 0.2)
    assert strict.rate == 0.01
    assert loose.threshold < strict.threshold
    assert strict.held_out_check().total == loose.held_out_check().total == 60
    assert 3 <= loose.held_out_check().count <= 24  # 12 expected
    assert strict.held_out_check().count <= 4


def test_the_reconstruction_score_has_quantiles(engine: Engine) -> None:
    quantiles = open_calibration(engine).reconstruction
    assert quantiles.shape == (101,)
    assert (np.diff(quantiles) >= 0).all()
    assert quantiles[0] > 0


# ---- heat maps ----


def test_an_overlay_colours_only_unusual_places() -> None:
    pixels = np.full((64, 64, 3), 90, np.uint8)
    places = np.zeros((4, 4), np.float32)
    places[3, 0] = 100
    drawn = np.asarray(overlay(pixels, places, np.array([0, 1, 2, 3], np.float32)))
    assert drawn.shape == (256, 256, 3)
    assert (drawn[:100, 140:] == 90).all()
    red, green, blue = drawn[240, 10].astype(int)
    assert red > green + 50 > blue
    assert strength(places, np.array([0, 1, 2, 3], np.float32)).max() == 1


def test_overlay_names_differ_where_keys_do() -> None:
    assert overlay_name("a.jpg") == "a.jpg.png"
    names = {overlay_name(key) for key in ("a/b.jpg", "a_b.jpg", "../a/b.jpg", "/a/b.jpg", "s3://a/b.jpg")}
    assert len(names) == 5
    assert not [name for name in names if "/" in name or name.startswith(".")]


def test_engine_fingerprints_name_the_file(calibrated_bundle: Path, engine: Engine) -> None:  # noqa: F811
    (name,) = files(open_bundle(calibrated_bundle))
    assert name.split(".")[1] == engine_fingerprint(engine)[:16]
