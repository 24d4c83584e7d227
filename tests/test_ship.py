"""The script that builds the shipped bundle: which photos it refuses to have seen, and what it writes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image
from serving import PHOTOS

sys.path.insert(0, str(REPOSITORY))

from benchmarks import heads as kinds
from benchmarks import ship, shown_photos
from benchmarks.ship_report import Task
from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine
from mixmim_serve.heads import read_heads


def seen(folder: Path, *, hat: bool = False, resized: bool = False) -> Path:
    """Photos that something was trained on: one that nobody shows, and perhaps the hat, as it is or made anew."""
    (folder / "hat").mkdir(parents=True)
    Image.linear_gradient("L").convert("RGB").save(folder / "hat" / "other.jpg")
    (folder / "hat" / "broken.jpg").write_bytes(b"no photo")
    if hat:
        shutil.copy(PHOTOS["hat"], folder / "hat" / "a.jpg")
    if resized:
        with Image.open(PHOTOS["hat"]) as image:
            image.resize((image.width * 3, image.height * 3)).save(folder / "hat" / "b.jpg", quality=60)
    return folder


def test_the_photos_of_readme_and_docs_may_not_be_trained_on(tmp_path: Path) -> None:
    shown = shown_photos.shown_photos()
    assert len(shown) == 16
    assert shown_photos.check_never_seen(shown, [seen(tmp_path / "new")]) > shown_photos.ALIKE
    with pytest.raises(AssertionError, match=r"hat\.jpg was trained on: .*/a\.jpg"):
        shown_photos.check_never_seen(shown, [seen(tmp_path / "copied", hat=True)])
    with pytest.raises(AssertionError, match=r"hat\.jpg was trained on: it looks like .*/b\.jpg"):
        shown_photos.check_never_seen(shown, [seen(tmp_path / "resized", resized=True)])


def test_the_shown_photos_are_new_to_each_other() -> None:
    """So the limit that finds a resized copy does not take two garments for one."""
    paths = list(PHOTOS.values())
    for path in paths:
        others = [shown_photos.thumbnail(other.read_bytes()) for other in paths if other != path]
        own = shown_photos.thumbnail(path.read_bytes())
        assert min(abs(own - other).mean() for other in others) > 2 * shown_photos.ALIKE


def test_answers_are_compared_with_the_names_of_the_photos(engine: Engine) -> None:
    head = read_heads(engine.bundle).choose()
    found = list(shown_photos.answers(engine, head))
    assert [answer.truth for answer in found if answer.photo.stem == "hat-2"] == ["hat"]
    assert {answer.label for answer in found} <= {"cat", "dog", "owl"}


@pytest.mark.slow  # exports a network, and starts servers
def test_the_script_builds_a_bundle_with_heads(
    small_checkpoint: Path, exported_bundle: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        shutil.copytree(labelled, tmp_path / "data" / name)
        for path in (tmp_path / "data" / name / "val").rglob("*.png"):  # in the fixture they are those of train
            with Image.open(path) as image:
                image.convert("RGB").rotate(3).save(path)
    monkeypatch.setattr(ship, "TASKS", (Task("garments", "one", "val"), Task("colours", "two", "val")))
    monkeypatch.setattr(ship, "DEFAULT_BUNDLE", exported_bundle)
    monkeypatch.setattr(ship, "STARTS", 1)
    out, report = tmp_path / "out", tmp_path / "report.md"
    arguments = [small_checkpoint, tmp_path / "data", "--out", out, "--report", report]
    monkeypatch.setattr(sys, "argv", ["ship", *map(str, arguments)])
    ship.main()
    bundle = open_bundle(out)
    bundle.verify()
    heads = read_heads(bundle)
    assert (heads.names, heads.default) == (("garments", "colours"), "garments")
    assert "logits" not in bundle.graphs["encoder"]
    assert bundle.weights == "float16"
    assert heads.choose().about["provenance"]["images"]["source"] == "one/train"
    assert str(tmp_path) not in repr(heads.describe())
    text = report.read_text()
    assert "| garments | 2 | 24 | 8 (one val) | 100.0 |" in text
    assert "photos of README and docs are answered rightly" in text
    assert "| all |" in text


@pytest.mark.slow
def test_kinds_of_heads_are_compared(
    exported_bundle: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "EPOCHS", 4)
    report = tmp_path / "heads.md"
    arguments = [exported_bundle, labelled.parent, "--sets", f"{labelled.name}/val", "--out", report]
    monkeypatch.setattr(sys, "argv", ["heads", *map(str, arguments)])
    kinds.main()
    rows = [line for line in report.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(kinds.KINDS)
    assert rows[0].startswith("| linear on the embedding | 100.0 |")
