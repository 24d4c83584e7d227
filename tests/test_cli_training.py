"""The training commands; those for fine-tuning, probing and evaluating are in test_finetuning.py."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
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
from mixmim_serve.settings import override
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.recipes import tiny_cpu, tiny_finetune_cpu
from training.summary import summary
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
    printed = dict(re.findall(r"^([a-z][a-z ]+?)  +(.*)$", result.output, re.MULTILINE))  # the configuration
    assert printed["network"] == "tiny at 64 px"
    assert printed["epochs"] == "1, with 0.12 of warm-up"
    assert printed["batch"] == "4 images"
    assert "float32" in printed["compute"]
    assert "seed 3" in printed["decoding"]
    assert "--verbose" in printed["all settings"]
    assert "keep_last" not in result.output
    assert load_checkpoint(run / "final.safetensors")[1].arch == architecture("tiny").at(64)
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["epochs"], config["batch_size"], config["workers"]) == (1, 4, 0)
    assert (config["seed"], config["bf16"]) == (3, False)
    assert config["warmup_epochs"] == pytest.approx(tiny_cpu().warmup_epochs / tiny_cpu().epochs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["knn20_top1"] == 100
    result = mixmim("pretrain", photos, "--out", run, *options, "--set", "seed=3", "--set", "bf16=false", "--resume")
    assert "is already finished" in " ".join(result.output.split())  # lines wrap


def test_verbose_prints_every_setting(photos: Path, tmp_path: Path) -> None:
    """Before anything else can stop the run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    result = mixmim("pretrain", photos, "--out", tmp_path / "run", "--batch-size", 4, "--epochs", 3, "--verbose")
    assert isinstance(result.exception, MixMIMError)
    expected = dataclasses.replace(tiny_cpu().with_epochs(3), batch_size=4, compile=False)
    assert json.loads(result.output[result.output.index("{") :]) == json.loads(json.dumps(dataclasses.asdict(expected)))


def test_the_summary_has_what_matters_and_what_was_changed() -> None:
    recipe = tiny_finetune_cpu()
    rows = dict(summary(recipe, recipe))
    assert rows["network"] == "the checkpoint's at the checkpoint's input size"
    assert rows["images"] == "crops of 25% of an image or more, label smoothing 0.1"
    assert rows["layers"] == "rate times 0.85 per layer, drop path 0.05"
    assert "also changed" not in rows
    changed = override(recipe, ["keep_last=5", "augment.mixup=0.8", "batch_size=32", "compile=false"])
    rows = dict(summary(changed, recipe))
    assert rows["also changed"] == "keep_last=5, augment.mixup=0.8"
    assert rows["batch"] == "32 images"
    assert rows["learning rate"] == "0.0005 at most, weight decay 0.05"
    assert rows["compute"] == "bf16, not compiled"
    assert "mixup 0.8" in rows["images"]


def test_next_commands_can_be_pasted(labelled: Path, photos: Path, tmp_path: Path) -> None:
    """A folder with a space and a quote in its name."""
    folder = tmp_path / "Anna's runs"
    options = ("--image-size", 64, "--epochs", 1, "--batch-size", 4, "--workers", 0)
    result = mixmim("pretrain", photos, "--out", folder / "first", *options)
    final = folder / "first" / "final.safetensors"
    assert f"wrote {final}; next: " in result.output
    words = shlex.split(result.output.rpartition("next: ")[2])
    assert words == ["mixmim", "export", str(final), "BUNDLE_DIR"]
    probed = mixmim("probe", labelled, "--from", final, "--save", folder / "head.safetensors")
    words = shlex.split(probed.output.rpartition("next: ")[2])
    assert words == ["mixmim", "export", str(folder / "head.safetensors"), "BUNDLE_DIR"]
    tuned = mixmim("finetune", labelled, "--from", final, "--out", folder / "tuned", *options[2:],
                   "--set", "compile=false")  # fmt: skip
    assert shlex.split(tuned.output.rpartition("next: ")[2]) == [
        "mixmim", "evaluate", "TEST_DATA", "--from", str(folder / "tuned" / "final.safetensors"), "or",
        "mixmim", "export", str(folder / "tuned" / "final.safetensors"), "BUNDLE_DIR",
    ]  # fmt: skip


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
    assert json.loads(mixmim("check", photos, "--json").stdout)["image_size"] == 128
    (tmp_path / "empty").mkdir()
    assert isinstance(refusal("check", tmp_path / "empty"), DataError)


def test_check_exits_with_1_when_an_image_is_unreadable(spoilt: Path) -> None:
    result = mixmim("check", spoilt)
    assert result.exit_code == 1
    assert "unreadable: 2" in result.stdout
    assert "passed over 1 file: .csv (1)" in result.stdout
    assert mixmim("check", spoilt, "--json").exit_code == 1


def test_replay_needs_a_saved_step(tmp_path: Path) -> None:
    assert "holds no saved step" in str(refusal("replay", tmp_path))


def test_no_command_has_more_than_fifteen_options() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        options = [
            hint
            for hint in command.callback.__annotations__.values()
            if "typer.Option" in hint or hint in ("Out", "Set", "Epochs", "BatchSize", "ImageSize", "Workers", "Track",
                                                  "Resume", "Overwrite", "Verbose", "From", "Val", "Seed")
        ]  # fmt: skip
        assert len(options) <= 15, command.callback.__name__


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
