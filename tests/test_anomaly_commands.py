"""`mixmim calibrate`, `anomaly` and `drift`: what they print, write and exit with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from anomalies import NORMAL, calibrated_bundle, normal_photos, write_photos  # noqa: F401 - fixtures
from PIL import Image
from serving import IDENTITY
from test_cli import Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture

from mixmim_serve.anomaly.calibration import files
from mixmim_serve.anomaly.detector import open_detector
from mixmim_serve.anomaly.drift import Exit, Scored, compare, score_source
from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.sources import open_source

ONNX = ("--engine", "onnx")


@pytest.fixture(scope="module")
def calibrated(calibrated_bundle: Path) -> Engine:  # noqa: F811
    return open_engine(calibrated_bundle, "onnx", threads=1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty normal photos and ten odd ones, in class folders."""
    root = tmp_path_factory.mktemp("labelled")
    write_photos(root / "good", 30, seed=21)
    write_photos(root / "odd", 10, odd=True, seed=22)
    return root


# ---- calibrate ----


def test_calibrate_writes_into_the_bundle(mixmim: Mixmim, bundle_copy: Path, normal_photos: Path) -> None:  # noqa: F811
    before = open_bundle(bundle_copy)
    outcome = mixmim("calibrate", bundle_copy, normal_photos, "--patches", 100, *ONNX)
    assert outcome.code == 0
    first, second, third = outcome.out.splitlines()
    assert first == f"wrote {bundle_copy}: calibrated for onnx-cpu fp32 on {NORMAL} photos, 100 patches"
    assert re.fullmatch(r"threshold \d+\.\d{3} at a false-alarm rate of 1\.0 %", second)
    assert re.match(r"held-out check, photos beyond the threshold of the others: \d+ of 60: \d", third)
    assert f"note: {NORMAL} photos say little of a rate of 1.0 %" in outcome.err
    after = open_bundle(bundle_copy)
    after.verify()
    assert after.fingerprint == before.fingerprint
    assert json.loads(mixmim("info", bundle_copy).out)["calibrations"][0]["photos"] == NORMAL


def test_calibrate_writes_a_copy(
    mixmim: Mixmim,  # noqa: F811
    exported_bundle: Path,
    normal_photos: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    arguments = ("calibrate", exported_bundle, normal_photos, "--output", tmp_path / "copy", "--patches", 50, *ONNX)
    assert mixmim(*arguments, "--false-alarms", 0.1).code == 0
    assert files(open_bundle(exported_bundle)) == []
    assert open_detector(open_engine(tmp_path / "copy", "onnx")).rate == 0.1
    assert_one_sentence(mixmim(*arguments), "is already a bundle")
    assert mixmim(*arguments, "--overwrite").code == 0
    assert open_detector(open_engine(tmp_path / "copy", "onnx")).rate == 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_shipped_bundle_is_not_written_to(mixmim: Mixmim, normal_photos: Path) -> None:  # noqa: F811
    assert_one_sentence(mixmim("calibrate", "tiny", normal_photos), "tiny is shared: write a calibrated copy")


def test_few_photos_are_one_sentence(mixmim: Mixmim, bundle_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    few = write_photos(tmp_path / "few", 20)
    outcome = mixmim("calibrate", bundle_copy, few, *ONNX)
    assert_one_sentence(outcome, "has 20 readable photos, a calibration needs at least 50: add normal photos.")
    assert files(open_bundle(bundle_copy)) == []


def test_photos_that_cannot_be_read_are_named(
    mixmim: Mixmim,  # noqa: F811
    bundle_copy: Path,
    tmp_path: Path,
) -> None:
    folder = write_photos(tmp_path / "normal", 51)
    (folder / "007.png").write_bytes(b"no image")
    outcome = mixmim("calibrate", bundle_copy, folder, "--patches", 20, *ONNX)
    assert (outcome.code, "on 50 photos" in outcome.out) == (0, True)
    assert "007.png: " in outcome.err


# ---- anomaly ----


def test_anomaly_prints_a_line_per_photo(
    mixmim: Mixmim,  # noqa: F811
    calibrated_bundle: Path,  # noqa: F811
    labelled: Path,
    tmp_path: Path,
) -> None:
    outcome = mixmim("anomaly", calibrated_bundle, labelled, "--overlays", tmp_path / "maps", "--map", *ONNX)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.lines
    assert len(lines) == 40
    assert lines[0].keys() == {"path", "score", "percentile", "normal", "threshold", "map", "overlay"} | IDENTITY
    assert np.shape(lines[0]["map"]) == (2, 2)
    assert not any(line["normal"] for line in lines if line["path"].startswith("odd/"))
    for line in lines:
        with Image.open(line["overlay"]) as picture:
            assert picture.size == (256, 256)
    assert len({line["overlay"] for line in lines}) == 40
    (one,) = mixmim("anomaly", calibrated_bundle, labelled / "odd" / "000.png", *ONNX).lines
    expected = next(line for line in lines if line["path"] == "odd/000.png")
    assert one["score"] == pytest.approx(expected["score"], rel=1e-3)
    assert one.keys() == {"path", "score", "percentile", "normal", "threshold"} | IDENTITY


def test_the_rate_can_be_set(mixmim: Mixmim, calibrated_bundle: Path, labelled: Path) -> None:  # noqa: F811
    arguments = ("anomaly", calibrated_bundle, labelled / "good" / "000.png", *ONNX)
    strict, loose = (mixmim(*arguments, "--false-alarms", rate).lines[0]["threshold"] for rate in (0.01, 0.3))
    assert loose < strict
    assert_one_sentence(mixmim(*arguments, "--false-alarms", 0), "a false-alarm rate must be above 0")


def test_unreadable_photos_are_named_and_the_others_judged(
    mixmim: Mixmim,  # noqa: F811
    calibrated_bundle: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    outcome = mixmim("anomaly", calibrated_bundle, tmp_path / "photos", *ONNX)
    assert (outcome.code, len(outcome.lines)) == (1, 2)
    assert outcome.err.startswith("mixmim: bad.png: ")


def test_without_a_calibration_it_is_one_sentence(mixmim: Mixmim, exported_bundle: Path, labelled: Path) -> None:  # noqa: F811
    for command in ("anomaly", "drift"):
        assert_one_sentence(mixmim(command, exported_bundle, labelled, *ONNX), "this bundle is not calibrated: ")


def test_a_score_has_a_percentile(mixmim: Mixmim, calibrated_bundle: Path, labelled: Path) -> None:  # noqa: F811
    (line,) = mixmim("score", calibrated_bundle, labelled / "good" / "000.png", *ONNX).lines
    assert line.keys() == {"path", "score", "percentile"} | IDENTITY
    assert 0 <= line["percentile"] <= 100


# ---- drift ----


def test_a_normal_folder_ends_with_0(mixmim: Mixmim, calibrated_bundle: Path, labelled: Path) -> None:  # noqa: F811
    outcome = mixmim("drift", calibrated_bundle, labelled / "good", *ONNX)
    assert outcome.code == Exit.NOTHING
    assert "the distribution of scores did not move" in outcome.out
    assert "no more than a false-alarm rate of 1.0 % explains" in outcome.out


def test_odd_photos_end_with_3_and_a_page(
    mixmim: Mixmim,  # noqa: F811
    calibrated_bundle: Path,  # noqa: F811
    labelled: Path,
    tmp_path: Path,
) -> None:
    arguments = ("drift", calibrated_bundle, labelled, "--normal", "good", "--worst", 12, *ONNX)
    outcome = mixmim(*arguments, "--html", tmp_path / "page.html", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == report["exit_code"] == Exit.ALARMS
    assert (report["photos"], report["unreadable"], report["alarms"]) == (40, 0, True)
    assert report["beyond"] >= 10
    assert report["auroc"] > 0.95
    assert report["curve"]["false_alarms"][-1] == report["curve"]["found"][-1] == 1
    assert [each["path"].split("/")[0] for each in report["worst"]][:8] == ["odd"] * 8
    scores = [each["score"] for each in report["worst"]]
    assert (len(scores), scores) == (12, sorted(scores, reverse=True))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 12
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # nothing from elsewhere
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        ElementTree.fromstring(chart)  # noqa: S314 - ours
    assert f"AUROC {report['auroc']:.3f}" in page
    assert "AUROC" in mixmim(*arguments).out


def test_unreadable_photos_alone_end_with_1(
    mixmim: Mixmim,  # noqa: F811
    calibrated_bundle: Path,  # noqa: F811
    labelled: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(labelled / "good", tmp_path / "photos"))
    (folder / "bad.png").write_bytes(b"")
    outcome = mixmim("drift", calibrated_bundle, folder, *ONNX)
    assert outcome.code == Exit.UNREADABLE
    assert "mixmim: bad.png: " in outcome.err


def scored(scores: np.ndarray, threshold: float) -> Scored:
    names = [str(number) for number in range(len(scores))]
    return Scored(names, scores.astype(np.float32), (scores <= threshold).tolist(), [], None, [])


def test_the_tests_keep_their_level_on_normal_folders(calibrated: Engine) -> None:
    """Scores drawn again from the normal ones: neither test may raise more than its share of alarms."""
    detector, rng = open_detector(calibrated, 0.05), np.random.default_rng(0)
    codes = [compare(detector, scored(rng.choice(detector.normal, 200), detector.threshold)).code for _ in range(100)]
    assert sum(code != Exit.NOTHING for code in codes) <= 3


def test_a_shift_that_stays_below_the_threshold_ends_with_4(calibrated: Engine) -> None:
    detector, rng = open_detector(calibrated), np.random.default_rng(1)
    low = np.quantile(detector.normal, 0.1)
    report = compare(detector, scored(rng.normal(low, 1e-3, 100), detector.threshold))
    assert (report.code, report.has_alarms, report.beyond.count) == (Exit.MOVED, False, 0)
    assert report.superiority < 0.2
    assert report.distance > 0.7


def test_a_shift_that_matters_to_nobody_is_none(calibrated: Engine) -> None:
    """With very many photos on both sides every difference is significant."""
    detector, rng = open_detector(calibrated), np.random.default_rng(2)
    detector.normal = np.sort(rng.normal(size=50_000)).astype(np.float32)
    report = compare(detector, scored(rng.normal(0.1, 1, 50_000), 9))
    assert report.moved_p < 1e-6
    assert report.distance < 0.1
    assert not report.has_moved


def test_a_class_that_is_not_there_is_refused(calibrated: Engine, labelled: Path) -> None:
    detector = open_detector(calibrated)
    found = score_source(calibrated, detector, open_source(labelled), 3)
    with pytest.raises(ConfigError, match=r"'gut' cannot be the normal class: .* found good, odd"):
        compare(detector, found, "gut")
    flat = score_source(calibrated, detector, open_source(labelled / "good"), 3)
    with pytest.raises(ConfigError, match="found no class folders"):
        compare(detector, flat, "good")


def test_a_folder_without_a_readable_photo_is_refused(calibrated: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="has no readable photo"):
        score_source(calibrated, open_detector(calibrated), open_source(tmp_path), 3)
