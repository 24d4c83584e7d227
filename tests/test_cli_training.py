"""The training commands; those for fine-tuning, probing and evaluating are in test_finetuning.py."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from training_data import SMALL
from typer.testing import CliRunner, Result

import training.recipes
from mixmim_serve.cli import app
from mixmim_serve.config import architecture
from mixmim_serve.errors import ConfigError, DataError, MixMIMError
from mixmim_serve.model.checkpoint import load_checkpoint
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.trainer import train


@pytest.fixture(autouse=True)
def without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip torch.compile, which takes a minute."""
    for name in ("tiny-cpu", "tiny-continue-cpu"):
        recipe = dataclasses.replace(training.recipes.PRETRAIN[name](), compile=False)
        monkeypatch.setitem(training.recipes.PRETRAIN, name, lambda recipe=recipe: recipe)


def mixmim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> MixMIMError:
    error = mixmim(*arguments).exception
    assert isinstance(error, MixMIMError), error
    return error


def test_pretrain(photos: Path, labelled: Path, tmp_path: Path) -> None:
    """From options to a checkpoint."""
    run = tmp_path / "run"
    options = ("--image-size", 64, "--epochs", 1, "--batch-size", 4, "--workers", 0, "--knn", labelled)
    result = mixmim("pretrain", photos, "--out", run, *options, "--set", "seed=3", "--set", "bf16=false")
    assert result.exit_code == 0, result.output
    assert f"wrote {run / 'final.safetensors'}; next: mixmim export" in result.output
    assert '"batch_size": 4' in result.output  # the configuration is printed
    assert load_checkpoint(run / "final.safetensors")[1].arch == architecture("tiny").at(64)
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["epochs"], config["batch_size"], config["workers"]) == (1, 4, 0)
    assert (config["seed"], config["bf16"]) == (3, False)
    assert config["warmup_epochs"] == pytest.approx(tiny_cpu().warmup_epochs / tiny_cpu().epochs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["knn20_top1"] == 100
    result = mixmim("pretrain", photos, "--out", run, *options, "--set", "seed=3", "--set", "bf16=false", "--resume")
    assert "is already finished" in " ".join(result.output.split())  # lines wrap


def test_pretrain_refuses_what_cannot_work(photos: Path, labelled: Path, tmp_path: Path) -> None:
    run = ("pretrain", photos, "--out", tmp_path / "run")
    assert "unknown recipe 'huge'" in str(refusal(*run, "--recipe", "huge"))
    assert "multiple of 32" in str(refusal(*run, "--image-size", 65))
    assert "did you mean mask_ratio" in str(refusal(*run, "--set", "mask_rate=0.5"))
    assert isinstance(refusal(*run, "--track", "comet"), ConfigError)
    assert "has no labels" in str(refusal(*run, "--knn", photos))
    assert "has no folders train and val" in str(refusal(*run, "--knn", labelled / "train"))
    assert "holds no run to resume" in str(refusal(*run, "--batch-size", 4, "--resume"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_check(labelled: Path, photos: Path, tmp_path: Path) -> None:
    result = mixmim("check", labelled)
    assert result.exit_code == 0
    assert f"train: {labelled / 'train'}" in result.stdout
    assert "24 images" in result.stdout
    assert "8 images" in result.stdout
    report = json.loads(mixmim("check", photos, "--val", photos, "--json", "--image-size", 64).stdout)
    assert (report["train"]["images"], report["image_size"], len(report["in_both"])) == (24, 64, 24)
    (tmp_path / "empty").mkdir()
    assert isinstance(refusal("check", tmp_path / "empty"), DataError)


def test_replay_needs_a_saved_step(tmp_path: Path) -> None:
    assert "holds no saved step" in str(refusal("replay", tmp_path))


def test_no_command_has_more_than_fourteen_options() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        options = [
            hint
            for hint in command.callback.__annotations__.values()
            if "typer.Option" in hint or hint in ("Out", "Set", "Epochs", "BatchSize", "ImageSize", "Workers", "Track",
                                                  "Resume", "Overwrite", "From", "Val", "Seed")
        ]  # fmt: skip
        assert len(options) <= 14, command.callback.__name__


class Recorder(types.ModuleType):
    """Stands in for mlflow or wandb and records every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Recorder:
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize(("name", "number", "end"), [("mlflow", "log_metrics", "end_run"), ("wandb", "log", "finish")])
def test_trackers_get_numbers_and_pictures(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str, end: str
) -> None:
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    source = open_source(photos)
    train(Pretraining(dataclasses.replace(SMALL, epochs=1), source), source, tmp_path / "run", trackers=[name])
    steps = [(values["step"], said[0]["loss"]) for called, said, values in module.calls
             if called == number and said and "loss" in said[0]]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [(line["step"], line["loss"]) for line in lines]
    assert any("image" in called.lower() for called, _, _ in module.calls)
    assert module.calls[-1][0] == end
