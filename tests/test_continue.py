"""`mixmim pretrain DATA --from`: which weights are taken, resized or made anew, and what the checkpoint says of it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training_data import SMALL, killed_in
from typer.testing import CliRunner

import training.recipes
from mixmim_serve.cli import app
from mixmim_serve.cli.common import bundle_path
from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.errors import CheckpointError, ConfigError, MixMIMError
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint
from mixmim_serve.model.released import resize_weights
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.recipes import tiny_continue_cpu, tiny_cpu
from training.start import Start, read_start
from training.trainer import train

ARCH = Architecture(8, (1, 1, 2, 1), (1, 1, 2, 2), 64, decoder=DecoderConfig(16, 1, 2))
OWN = dataclasses.replace(SMALL, size="", image_size=0)  # size and input size of the checkpoint


def write(path: Path, arch: Architecture) -> Path:
    """A checkpoint of random weights, with pixels scaled in its own way."""
    torch.manual_seed(1)
    preprocessing = dataclasses.replace(Preprocessing.evaluation(arch.image_size), mean=(0.5, 0.5, 0.5))
    labels = ("blue", "red")[: arch.num_classes]
    save_checkpoint(path, build_model(arch).state_dict(), Description(arch, preprocessing, labels, {"by": "tests"}))
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, decoder and a head of two classes."""
    return write(tmp_path_factory.mktemp("pretrained") / "whole.safetensors", dataclasses.replace(ARCH, num_classes=2))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder alone."""
    return write(tmp_path_factory.mktemp("encoder") / "encoder.safetensors", dataclasses.replace(ARCH, decoder=None))


def is_of_the_decoder(name: str) -> bool:
    return name.startswith(("decoder", "mask_token"))


# Weights


def test_encoder_and_decoder_are_taken_to_the_last_bit_and_the_head_is_dropped(pretrained: Path) -> None:
    start = read_start(pretrained)
    task = Pretraining(OWN, None, start=start)
    weights = task.model.state_dict()
    assert weights.keys() == {name for name in start.weights if not name.startswith("head.")}
    assert all(torch.equal(weights[name], start.weights[name]) for name in weights)
    assert task.arch == ARCH
    assert task.preprocessing.mean == (0.5, 0.5, 0.5)
    assert task.loaded == f"starts from {pretrained}: encoder and decoder"


def test_a_new_decoder_leaves_only_the_encoder(pretrained: Path) -> None:
    start = read_start(pretrained)
    task = Pretraining(OWN, None, start=start, new_decoder=True)
    for name, weight in task.model.state_dict().items():
        constant = name == "decoder_pos_embed" or ".norm" in name or name.endswith("bias") or "norm." in name
        if not is_of_the_decoder(name):
            assert torch.equal(weight, start.weights[name]), name
        elif not constant:
            assert not torch.equal(weight, start.weights[name]), name
    assert task.arch == ARCH
    assert task.loaded == f"starts from {pretrained}: encoder, with a new decoder"


def test_an_encoder_alone_gets_the_decoder_of_its_size(encoder: Path, tmp_path: Path) -> None:
    task = Pretraining(OWN, None, start=read_start(encoder))
    assert task.arch.decoder == DecoderConfig()  # of no named size: the official one
    assert "encoder, with a new decoder" in task.loaded
    tiny = write(tmp_path / "tiny.safetensors", architecture("tiny", with_decoder=False).at(64))
    assert Pretraining(OWN, None, start=read_start(tiny)).arch == architecture("tiny").at(64)


def test_another_input_size_is_carried_over_as_in_fine_tuning(pretrained: Path) -> None:
    start = read_start(pretrained)
    task = Pretraining(dataclasses.replace(OWN, image_size=96), None, start=start)
    assert task.arch == ARCH.at(96)
    expected = resize_weights(start.weights, start.description.arch, ARCH.at(96))
    weights = task.model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    for name in ("absolute_pos_embed", "decoder_pos_embed", "layers.0.blocks.0.attn.relative_position_bias_table"):
        assert weights[name].shape != start.weights[name].shape
    assert task.loaded.endswith("encoder and decoder, resized from 64 to 96 px")


def test_a_checkpoint_that_does_not_fit_is_refused(pretrained: Path, tmp_path: Path) -> None:
    start = read_start(pretrained)
    with pytest.raises(ConfigError, match=r"whole.safetensors has size custom, not tiny: omit size to use the"):
        Pretraining(SMALL, None, start=start)
    with pytest.raises(ConfigError, match=r"a mask ratio of 0.5 takes 0 of 1 units: enlarge image_size"):
        Pretraining(dataclasses.replace(OWN, image_size=32), None, start=start)
    with pytest.raises(ConfigError, match="training from scratch needs a size"):
        Pretraining(OWN, None)
    gaps = {name: weight for name, weight in start.weights.items() if "decoder_pred" not in name}
    broken = Start(start.path, start.description, gaps)
    with pytest.raises(CheckpointError, match=r"whole.safetensors lacks weights: decoder_pred.bias, decoder_pred.we"):
        Pretraining(OWN, None, start=broken)
    Pretraining(OWN, None, start=broken, new_decoder=True)  # needs none of these


# Runs


def run(photos: Path, out: Path, start: Path, *, new_decoder: bool = False, resume: bool = False) -> Path | None:
    source = open_source(photos)
    task = Pretraining(OWN, source, start=read_start(start), new_decoder=new_decoder)
    return train(task, source, out, Console(file=io.StringIO()), resume=resume)


def test_the_origin_stays_in_the_provenance(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    first = run(photos, tmp_path / "first", pretrained)
    assert first is not None
    description, weights = read_checkpoint(first)
    assert description.arch == ARCH
    assert description.provenance["start"] == read_start(pretrained).identity
    origin = description.provenance["origin"]
    assert origin == {
        "name": str(pretrained),
        "identity": read_start(pretrained).identity,
        "taken": "encoder and decoder",
        "image_size": 64,
    }
    assert not torch.equal(weights["norm.weight"], read_start(pretrained).weights["norm.weight"])  # it learned
    second = run(photos, tmp_path / "second", tmp_path / "first", new_decoder=True)  # a run folder
    assert second is not None
    later = read_checkpoint(second)[0].provenance["origin"]
    assert (later["name"], later["taken"], later["origin"]) == (str(first), "encoder", origin)


def test_it_resumes_exactly_and_only_from_the_same_weights(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    whole = run(photos, tmp_path / "whole", pretrained)
    assert whole is not None
    with killed_in(4):
        run(photos, tmp_path / "run", pretrained)
    with pytest.raises(ConfigError, match=r"was started with start sha256:\w+ \(now sha256:\w+ \(encoder\)\): resume"):
        run(photos, tmp_path / "run", pretrained, new_decoder=True, resume=True)
    again = run(photos, tmp_path / "run", pretrained, resume=True)
    assert again is not None
    one, other = (read_checkpoint(path)[1] for path in (again, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


# The command


@pytest.fixture
def without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip torch.compile, which takes a minute."""
    recipe = dataclasses.replace(tiny_continue_cpu(), compile=False)
    monkeypatch.setitem(training.recipes.PRETRAIN, "tiny-continue-cpu", lambda: recipe)


def mixmim(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, MixMIMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())  # lines wrap


@pytest.mark.usefixtures("without_compilation")
def test_pretrain_goes_on_from_the_shipped_model(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--epochs", 1, "--batch-size", 8, "--workers", 0, "--image-size", 64, "--set", "bf16=false")
    said = mixmim("pretrain", photos, "--from", "tiny", "--out", out, *options)
    assert "starts from tiny: encoder and decoder, resized from 128 to 64 px" in said
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["size"] == ""
    assert about["config"]["base_lr"] == tiny_continue_cpu().base_lr == tiny_cpu().base_lr / 4
    origin = about["origin"]
    assert (origin["name"], origin["fingerprint"]) == ("tiny", "1fb760df8d2baa7cd412039e8c643e75")
    description = read_checkpoint(out / "final.safetensors")[0]
    assert description.arch == architecture("tiny").at(64)
    assert description.provenance["origin"] == origin
    name = "layers.2.blocks.0.mlp.fc1.weight"
    before = read_start(bundle_path(Path("tiny"))).weights[name]
    after = read_checkpoint(out / "final.safetensors")[1][name]
    assert 0 < (after - before).norm() < 0.1 * before.norm()  # a few steps from there


def test_pretrain_refuses_what_does_not_fit(photos: Path, tmp_path: Path) -> None:
    run = ("pretrain", photos, "--out", tmp_path / "run")
    with pytest.raises(ConfigError, match="--new-decoder needs --from"):
        mixmim(*run, "--new-decoder")
    with pytest.raises(ConfigError, match="tiny has size tiny, not base: omit size"):
        mixmim(*run, "--from", "tiny", "--size", "base")
    with pytest.raises(ConfigError, match="tiny has size tiny, not huge: omit size"):
        mixmim(*run, "--from", "tiny", "--set", "size=huge")
    with pytest.raises(CheckpointError, match="no such file"):
        mixmim(*run, "--from", tmp_path / "nothing.safetensors")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"config": {}, "task": "pretrain"}')
    with pytest.raises(CheckpointError, match="unfinished is a run that has not finished: finish it with --resume"):
        mixmim(*run, "--from", tmp_path / "unfinished")
    assert not (tmp_path / "run").exists()
