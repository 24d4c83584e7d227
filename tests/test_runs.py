"""Training runs given where a bundle or a checkpoint is expected."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from exporting import graphs_from
from test_cli import HAT, Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture

from mixmim_serve.bundle import check_target, open_bundle
from mixmim_serve.description import read_description
from mixmim_serve.errors import BundleError, CheckpointError
from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint
from mixmim_serve.runs import checkpoint_of, is_run
from training.config import PretrainConfig
from training.run_folder import RunFolder


@pytest.fixture
def run(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A run as training writes it, stopped after two checkpoints, whose provenance is as long as that of the final one.

    (`graphs_from` needs weights at the same place in the file.)
    """
    folder = RunFolder(tmp_path / "my runs" / "mine")
    folder.create(PretrainConfig(), {"task": "pretrain"})
    description, weights = read_checkpoint(small_checkpoint)
    for step, name in ((20, "first"), (100, "later")):
        said = dataclasses.replace(description, provenance={"made_by": name})
        folder.save(step, weights, said, {})
    return folder.path


def finish(run: Path, small_checkpoint: Path) -> None:
    """Write the final checkpoint."""
    description, weights = read_checkpoint(small_checkpoint)
    save_checkpoint(RunFolder(run).final, weights, description)


def test_a_run_is_told_from_a_bundle(run: Path, exported_bundle: Path, tmp_path: Path) -> None:
    assert is_run(run)
    assert not is_run(exported_bundle)
    assert not is_run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not is_run(tmp_path)


def test_the_final_checkpoint_else_the_newest(run: Path, small_checkpoint: Path) -> None:
    assert checkpoint_of(run) == (run / "checkpoints" / "step-00000100.safetensors", False)
    finish(run, small_checkpoint)
    assert checkpoint_of(run) == (run / "final.safetensors", True)
    assert checkpoint_of(run / "final.safetensors") == (run / "final.safetensors", True)


def test_what_has_no_checkpoint_is_refused(run: Path, exported_bundle: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet: let the run go on"):
        checkpoint_of(run)
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a training run"):
        checkpoint_of(exported_bundle)


@pytest.mark.parametrize("command", ["serve B", "info B", "embed B HAT", "extract B DIR OUT", "push B ./there"])
def test_a_run_in_place_of_a_bundle_is_told_what_exports_it(
    mixmim: Mixmim,  # noqa: F811
    run: Path,
    tmp_path: Path,
    command: str,
) -> None:
    names = {"B": run, "HAT": HAT, "DIR": HAT.parent, "OUT": tmp_path / "out"}
    outcome = mixmim(*(names.get(word, word) for word in command.split()))
    advice = f"{run} is a training run, not a bundle: run `mixmim export '{run}' bundles/mine`, then use bundles/mine."
    assert_one_sentence(outcome, advice)


def test_so_is_a_checkpoint(mixmim: Mixmim, run: Path, small_checkpoint: Path) -> None:  # noqa: F811
    finish(run, small_checkpoint)
    final = run / "final.safetensors"
    assert_one_sentence(
        mixmim("serve", final), f"is a checkpoint, not a bundle: run `mixmim export '{final}' bundles/mine`"
    )
    assert_one_sentence(mixmim("serve", small_checkpoint), f"`mixmim export {small_checkpoint} bundles/small`")


def test_export_of_a_run(
    mixmim: Mixmim,  # noqa: F811
    run: Path,
    small_checkpoint: Path,
    exported_bundle: Path,
    tmp_path: Path,
) -> None:
    with graphs_from(exported_bundle):
        early = mixmim("export", run, tmp_path / "early", "--name", "shoes v2")
        finish(run, small_checkpoint)
        final = mixmim("export", run, tmp_path / "final")
    assert (early.code, final.code) == (0, 0), early.err + final.err
    assert f"{run} is not finished: exporting its newest checkpoint, step-00000100.safetensors\n" in early.err
    bundle = open_bundle(tmp_path / "early")
    assert bundle.description.provenance == {"made_by": "later"}
    print_ = f"wrote {tmp_path / 'early'}: model shoes v2, model fingerprint {bundle.fingerprint}\n"
    assert early.out.startswith(print_)
    assert bundle.name == "shoes v2"
    assert "not finished" not in final.err
    finished = open_bundle(tmp_path / "final")
    assert (finished.name, finished.description) == ("final", read_description(small_checkpoint))


def test_a_name_that_cannot_be_is_refused_before_the_export(
    mixmim: Mixmim,  # noqa: F811
    small_checkpoint: Path,
    tmp_path: Path,
) -> None:
    outcome = mixmim("export", small_checkpoint, tmp_path / "out", "--name", "a\nb")
    assert_one_sentence(outcome, r"'a\nb' is not a name: give 1 to 100 printable characters")
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_a_run(run: Path) -> None:
    with pytest.raises(BundleError, match="exists and is not a bundle: choose another folder; nothing was overwritten"):
        check_target(run, overwrite=True)
    assert json.loads((run / "config.json").read_text())["task"] == "pretrain"
