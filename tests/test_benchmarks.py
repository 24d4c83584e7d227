"""The benchmarks run, and compare equal computations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from exporting import graphs_from

from mixmim_serve.config import Architecture, DecoderConfig
from mixmim_serve.model import MixMIM
from mixmim_serve.model.mixmim import random_units

sys.path.insert(0, str(REPOSITORY))

from benchmarks import data_loading
from benchmarks.ablation import VARIANTS
from benchmarks.engines_gpu import full_bundle, runtimes_here
from benchmarks.plain import PlainMixMIM

# Windows smaller than the grid in the first two stages.
ARCH = Architecture(8, (2, 1, 1, 1), (1, 1, 2, 2), 128, (8, 8, 8, 4), decoder=DecoderConfig(16, 2, 2))


@pytest.mark.parametrize("partner_units", [None, 8])
def test_the_plain_version_has_our_loss_and_gradients(partner_units: int | None) -> None:
    torch.manual_seed(0)
    ours, plain = MixMIM(ARCH).double().train(), PlainMixMIM(ARCH).double()
    for parameter in ours.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    pixels = torch.randn(4, 3, 128, 128, dtype=torch.float64)
    mask = random_units(16, 0.5, torch.Generator().manual_seed(0))
    loss = ours.pretrain(pixels, mask, partner_units).loss
    loss.backward()
    plain_loss = plain(pixels, mask)
    plain_loss.backward()
    assert plain_loss.item() == pytest.approx(loss.item(), rel=1e-6)  # the loss is taken in float32
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_ablation_trains_every_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.config.architecture", lambda _: ARCH)
    variant = VARIANTS[name]
    task = variant.task(variant.config(1, 0), None)
    assert task.model.attends_across == (variant.attention == "across")
    mask = random_units(16, variant.mask_ratio, torch.Generator().manual_seed(0))
    loss = task.objective.train()(torch.randn(4, 3, 128, 128), mask)
    assert 0.5 < float(loss.detach()) < 2
    loss.backward()
    assert not [name for name, parameter in task.model.named_parameters() if parameter.grad is None]


def run(*arguments: object, folder: Path = REPOSITORY) -> str:
    command = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=True).stdout


@pytest.mark.slow
def test_train_step_runs(tmp_path: Path) -> None:
    out = tmp_path / "steps.md"
    options = ("--variants", "plain", "eager", "--batch-size", 2, "--repeats", 2, "--warmup", 1, "--output", out)
    run("benchmarks.train_step", "--sizes", "tiny", "--device", "cpu", *options)
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["size"], row["variant"]) for row in rows] == [("tiny", "plain"), ("tiny", "eager")]
    assert all(row["variant"] in out.read_text() for row in rows)


SIZES = {"16 kB": 16e3, "75 kB": 75e3, "2 MB": 2e6}


def assert_files_are_as_large_as_named(out: Path, *names: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert tuple(row["file"] for row in rows) == names
    assert all(0.7 < row["bytes"] / SIZES[row["file"]] < 1.3 for row in rows)
    return rows


def test_data_loading_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But for its largest file, which takes seconds to make."""
    out = tmp_path / "loading.md"
    monkeypatch.delitem(data_loading.FILES, "2 MB")
    monkeypatch.setattr(sys, "argv", ["data_loading", "--images", "2", "--output", str(out)])
    data_loading.main()
    assert "75 kB" in capsys.readouterr().out
    assert_files_are_as_large_as_named(out, "16 kB", "75 kB")


@pytest.mark.slow
def test_the_whole_of_data_loading_runs(tmp_path: Path) -> None:
    out = tmp_path / "loading.md"
    assert "2 MB" in run("benchmarks.data_loading", "--images", 2, "--output", out)
    rows = assert_files_are_as_large_as_named(out, "16 kB", "75 kB", "2 MB")
    assert rows[2]["small decode"] < rows[2]["full decode"]


@pytest.mark.slow  # every precision takes half a minute
def test_the_gpu_benchmark_makes_its_bundles_where_no_engine_can_be_built(
    small_checkpoint: Path, bundle_in_every_precision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu", lambda: "")
    assert runtimes_here() == []
    with graphs_from(bundle_in_every_precision):
        bundle = full_bundle(small_checkpoint, tmp_path / "bundle", [])
    assert (bundle.precisions, bundle.built) == (("fp32", "fp16"), ())
