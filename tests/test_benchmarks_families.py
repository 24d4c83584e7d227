"""The benchmarks of families and of going on from a model run, keep each result, and go on after an interruption."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

from benchmarks import families, going_on


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_families_measures_pretrained_against_untrained_and_scratch(
    photos: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (labelled / "train").rglob("*.png"):
        for copy in range(3):  # fine-tuning has batches of 64
            target = tmp_path / "data" / "clothing10" / "train" / path.parent.name / f"{copy}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copytree(labelled / "val", tmp_path / "data" / "clothing10" / "test")
    out = tmp_path / "out"
    few = ("--epochs", 1, "--tuning-epochs", 1, "--seeds", 0, "--sets", "clothing10")
    arguments = (photos, tmp_path / "data", "--out", out, "--sizes", "pvt-mini", *few)
    run(families, monkeypatch, *arguments)
    found = {path.stem for path in (out / "pvt-mini").glob("*.json")}
    assert found == {f"clothing10-{name}-0" for name in
                     ("frozen-pretrained", "frozen-untrained", "tuned-pretrained", "tuned-scratch")}  # fmt: skip
    table = (out / "results.md").read_text()
    assert "## pvt-mini" in table
    assert table.count("(scratch)") == 2
    final = out / "pvt-mini" / "pretraining" / "final.safetensors"
    written = final.stat().st_mtime_ns
    (out / "pvt-mini" / "clothing10-frozen-untrained-0.json").unlink()
    run(families, monkeypatch, *arguments)
    assert final.stat().st_mtime_ns == written  # only what was missing
    assert (out / "pvt-mini" / "clothing10-frozen-untrained-0.json").exists()


@pytest.mark.slow
def test_going_on_compares_four_starts(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(labelled / "train", tmp_path / "data" / "train")
    shutil.copytree(labelled / "val", tmp_path / "data" / "test")
    out = tmp_path / "out"
    run(going_on, monkeypatch, tmp_path / "data", "--out", out, "--epochs", 1, "--seeds", 0, "--image-size", 64)
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert found.keys() == {"model-0", "untrained-0", "scratch-0", "continued-0"}
    assert all("linear probe" in values for values in found.values())
    assert "| data test | untrained | from scratch | from the model | as it is |" in (out / "results.md").read_text()


@pytest.mark.slow
def test_both_networks_of_the_export_comparison_are_the_same(tmp_path: Path) -> None:
    """Before any graph is timed: our `swin-mini` by import, theirs by transformers, both exported."""
    from benchmarks.transformers_export import prepare

    about = prepare("swin-mini", tmp_path / "swin-mini")
    assert about["plain_and_ours_in_torch"]["cosine"] > 0.999999
    assert about["plain_and_ours_in_torch"]["error"] < 1e-5
    assert Path(about["plain"]).is_file()
