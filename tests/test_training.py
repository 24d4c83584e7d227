"""Whole pretraining runs on the CPU, and what a trainer's step is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import NARROW, SMALL, STEPS_PER_EPOCH, Run, killed_in, run_pretraining

from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import read_description
from mixmim_serve.errors import ConfigError, DataError, NonFiniteError
from mixmim_serve.model import MixMIM
from mixmim_serve.model.checkpoint import load_checkpoint, read_checkpoint
from mixmim_serve.settings import from_dict
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.data import Batch
from training.distributed import World
from training.optim import learning_rate
from training.pretraining import Pretraining
from training.recipes import tiny_cpu
from training.replay import replay
from training.run_folder import RunFolder
from training.trainer import Trainer, train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs over the photos."""
    return run_pretraining(SMALL, photos, tmp_path_factory.mktemp("run") / "new" / "run")


@pytest.fixture
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


def trainer_of(config: PretrainConfig, images: Path, run: Path) -> Trainer:
    source = open_source(images)
    run.mkdir(exist_ok=True)
    return Trainer(Pretraining(config, source), source, RunFolder(run), ALONE)


def first_batch(trainer: Trainer) -> Batch:
    batch: Batch = next(iter(trainer.loader))
    return batch


# Whole runs


def test_a_run_leaves_the_documented_files(run: Run) -> None:
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    events = [name for name in files if name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert files - {*events, ".lock"} == {
        "config.json", "metrics.jsonl", "final.safetensors", "samples/reconstructions-epoch-0002.png",
        "checkpoints/step-00000003.safetensors", "checkpoints/step-00000006.safetensors",
        "checkpoints/step-00000006.state.pt",
    }  # fmt: skip
    assert run.final == run.path / "final.safetensors"
    about = json.loads((run.path / "config.json").read_text())
    assert from_dict(PretrainConfig, about["config"]) == SMALL
    assert (about["task"], about["start"], about["processes"]) == ("pretrain", "scratch", 1)
    assert about["images"]["count"] == 24
    assert about["command"] == sys.argv
    assert "epoch 1/2  loss" in run.printed
    assert "epoch 2/2  loss" in run.printed
    assert "pretrain: 6.3 M parameters at 64 px on cpu; 24 images, 2 epochs of 3 steps" in run.printed
    assert "unreadable" not in run.printed


def test_metrics_say_what_was_done(run: Run) -> None:
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]
    for line in run.metrics:
        assert line.keys() == {"step", "epoch", "loss", "lr", "grad_norm", "rate", "waiting", "memory"}
        assert line["epoch"] == pytest.approx(line["step"] / STEPS_PER_EPOCH, abs=1e-4)
        assert line["lr"] == pytest.approx(learning_rate((line["step"] - 1) / STEPS_PER_EPOCH, SMALL))
        assert 0 < line["loss"] < 10
        assert 0 < line["grad_norm"] < 10
        assert 0 < line["rate"] < math.inf
        assert 0 < line["waiting"] < 1
        assert 0.1 < line["memory"] < 50


def test_tensorboard_reads_the_same_numbers(run: Run) -> None:
    events = EventAccumulator(str(run.path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.losses, rel=1e-6)
    assert [event.step for event in events.Images("reconstructions")] == [6]


def test_the_sample_picture_shows_pairs(run: Run) -> None:
    picture = Image.open(run.path / "samples" / "reconstructions-epoch-0002.png")
    pixels = np.asarray(picture)
    assert picture.height % 4 == 0  # four pairs
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # pictures, not blanks


def test_the_final_checkpoint_can_be_used(run: Run) -> None:
    model, description = load_checkpoint(run.final)
    assert isinstance(model, MixMIM)
    assert description.arch == SMALL.arch == architecture("tiny").at(64)
    assert description.preprocessing == Preprocessing.evaluation(64)
    provenance = description.provenance
    assert (provenance["epochs"], provenance["images"]["count"], provenance["loss"]) == (2, 24, run.losses[-1])
    with torch.inference_mode():
        embedding = model(torch.randn(2, 3, 64, 64)).embedding_BD
    assert embedding.shape == (2, 256)
    assert embedding.isfinite().all()
    first = read_checkpoint(run.path / "checkpoints" / "step-00000003.safetensors")
    assert first[0].provenance["epochs"] == 1
    assert not torch.equal(first[1]["norm.weight"], model.norm.weight)


def test_the_same_seed_gives_the_same_weights(run: Run, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # whatever was drawn before changes nothing
    again = run_pretraining(SMALL, photos, tmp_path / "again")
    assert again.losses == run.losses
    one, two = (read_checkpoint(path)[1] for path in (again.final, run.final))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_line_is_the_mean_since_the_last_one(run: Run, photos: Path, tmp_path: Path) -> None:
    """Also across epochs, and the steps after the last multiple are not lost; logging changes no number."""
    rare = run_pretraining(dataclasses.replace(SMALL, log_every=4), photos, tmp_path / "rare")
    assert [line["step"] for line in rare.metrics] == [4, 6]
    assert rare.losses == pytest.approx([np.mean(run.losses[:4]), np.mean(run.losses[4:])], abs=2e-6)
    never = run_pretraining(dataclasses.replace(SMALL, epochs=1, log_every=10), photos, tmp_path / "never")
    assert [line["step"] for line in never.metrics] == [3]
    assert read_checkpoint(never.final)[0].provenance["loss"] == never.losses[0]


@pytest.mark.usefixtures("narrow_network")
def test_the_last_checkpoints_and_those_of_every_so_many_epochs_stay(photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=7, keep_last=2, keep_every=3, save_steps=2)
    run = run_pretraining(config, photos, tmp_path / "run")
    kept = sorted(int(path.name[5:13]) for path in (run.path / "checkpoints").glob("*.safetensors"))
    assert kept == [9, 18, 20, 21]  # epochs 3 and 6, and the last two
    assert [path.name for path in (run.path / "checkpoints").glob("*.state.pt")] == ["step-00000021.state.pt"]
    assert len(list((run.path / "checkpoints").iterdir())) == len(kept) + 1


@pytest.mark.usefixtures("narrow_network")
def test_a_run_says_what_it_takes_on_disk(photos: Path, tmp_path: Path) -> None:
    run = run_pretraining(SMALL, photos, tmp_path / "run")
    files = [path for path in run.path.rglob("*") if path.is_file() and path != run.final]
    assert run.final.samefile(run.path / "checkpoints" / "step-00000006.safetensors")  # takes no space of its own
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    assert f"{run.path} takes {megabytes:.0f} MB: 2 checkpoints and one state to resume" in " ".join(
        run.printed.split()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        copied = run_pretraining(SMALL, photos, tmp_path / "copied")
    assert not copied.final.samefile(copied.path / "checkpoints" / "step-00000006.safetensors")
    one, two = (read_checkpoint(path)[1] for path in (copied.final, run.final))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_longer_run_keeps_no_more_checkpoints() -> None:
    config = tiny_cpu()
    assert config.with_epochs(200).keep_every == 8 * config.keep_every
    assert config.with_epochs(5).keep_every == config.keep_every


def test_gradient_accumulation_equals_the_large_batch(run: Run, photos: Path, tmp_path: Path) -> None:
    parts = run_pretraining(dataclasses.replace(SMALL, accumulate=4), photos, tmp_path / "parts")
    assert parts.losses == pytest.approx(run.losses, rel=1e-5)
    gradients = []
    for accumulate in (1, 2):
        trainer = trainer_of(dataclasses.replace(SMALL, accumulate=accumulate), photos, tmp_path / "run")
        trainer.set_learning_rate(1)
        loader = iter(trainer.loader)
        trainer.train_step(next(loader) for _ in range(accumulate))
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_activation_checkpointing_changes_no_number(run: Run, photos: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, checkpoint_activations=True)
    frugal = run_pretraining(config, photos, tmp_path / "frugal")
    assert frugal.losses == run.losses
    one, two = (read_checkpoint(path)[1] for path in (frugal.final, run.final))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_activation_checkpointing_keeps_less(photos: Path, tmp_path: Path) -> None:
    saved = []
    for frugal in (False, True):
        trainer = trainer_of(dataclasses.replace(SMALL, checkpoint_activations=frugal), photos, tmp_path / "run")
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.compiler.forward(*trainer.task.inputs(first_batch(trainer), 0, 0))
        saved.append(kept)
    assert saved[1] < saved[0] / 3


def test_another_seed_gives_other_weights(photos: Path, tmp_path: Path) -> None:
    one, two = (trainer_of(dataclasses.replace(SMALL, seed=seed), photos, tmp_path / "run") for seed in (0, 1))
    assert not torch.equal(one.model.mask_token, two.model.mask_token)
    assert not torch.equal(first_batch(one).pixels_BHWC, first_batch(two).pixels_BHWC)


def test_a_process_draws_one_mask_a_step(photos: Path) -> None:
    task = Pretraining(SMALL, None)
    batch = Batch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.zeros(2), torch.zeros(2, dtype=torch.bool), ())
    masks = {tuple(task.inputs(batch, seed, part)[1][0].tolist()) for seed in range(40) for part in range(2)}
    assert len(masks) == 6  # all ways to take two of four units
    assert all(sum(mask) == 2 for mask in masks)
    assert torch.equal(task.inputs(batch, 3, 0)[1], task.inputs(batch, 3, 1)[1])
    assert task.inputs(batch, 3, 0)[1].shape == (1, 4)


@pytest.mark.usefixtures("narrow_network")
def test_unreadable_images_are_skipped_and_named_once(spoilt: Path, tmp_path: Path) -> None:
    run = run_pretraining(SMALL, spoilt, tmp_path / "run")
    lines = sorted((run.path / "unreadable.txt").read_text().splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("holiday/cut.jpeg: the JPEG image is truncated")
    assert lines[1].startswith("letter.jpg: the data is not an image")
    last_epoch = next(line for line in run.printed.splitlines() if "epoch 2/2" in line)
    assert "2 unreadable" in last_epoch
    assert len(run.metrics) == 2 * STEPS_PER_EPOCH
    assert all(math.isfinite(loss) for loss in run.losses)
    assert load_checkpoint(run.final)[1].provenance["images"]["count"] == 24  # as listed


@pytest.mark.usefixtures("narrow_network")
def test_pretraining_is_judged_by_its_neighbours(photos: Path, labelled: Path, tmp_path: Path) -> None:
    from training.evaluation.labelled import open_labelled

    train_part, val_part = open_labelled(str(labelled))
    assert val_part is not None
    source = open_source(photos)
    config = dataclasses.replace(SMALL, epochs=3, knn_every=2)
    task = Pretraining(config, source, (train_part, val_part))
    assert train(task, source, tmp_path / "run", Console(quiet=True)) is not None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "knn20_top1" in line]
    assert [line["step"] for line in judged] == [6, 9]  # after epoch 2, and after the last
    assert all(line["knn20_top1"] == 100 for line in judged)  # colours alone tell the classes apart
    plain = run_pretraining(config, photos, tmp_path / "plain")  # judging changes no number
    assert [line["loss"] for line in lines if "loss" in line] == plain.losses


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path) -> None:
    """30 steps on ramps in four directions, the same ramp in each unit of an image; one epoch, so one checkpoint.

    What was hidden can only be told from what is visible: whoever ignores that stays at a loss of 1.
    """
    ramp = np.tile(np.linspace(40, 215, 32).astype(np.uint8), (64, 2))
    (tmp_path / "ramps").mkdir()
    for number in range(30 * 8):
        Image.fromarray(np.rot90(ramp, number).copy()).save(tmp_path / "ramps" / f"{number:03}.png")
    config = dataclasses.replace(SMALL, epochs=1, warmup_epochs=0.1, min_crop=1.0)
    losses = run_pretraining(config, tmp_path / "ramps", tmp_path / "run").losses
    assert len(losses) == 30
    assert losses[0] > 0.9
    assert losses[-1] < 0.3


def test_bf16_is_near_float32(photos: Path, tmp_path: Path) -> None:
    losses = {}
    for bf16 in (False, True):
        trainer = trainer_of(dataclasses.replace(SMALL, bf16=bf16), photos, tmp_path / "run")
        losses[bf16] = float(trainer.train_step([first_batch(trainer)])[0])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert losses[True] != losses[False]  # autocast was on
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def test_a_step_moves_every_parameter(photos: Path, tmp_path: Path) -> None:
    trainer = trainer_of(dataclasses.replace(SMALL, weight_decay=0.0), photos, tmp_path / "run")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train_step([first_batch(trainer)])
    still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about its own parts
def test_compiled_training_gives_the_same_losses(run: Run, photos: Path, tmp_path: Path) -> None:
    compiled = run_pretraining(dataclasses.replace(SMALL, compile=True), photos, tmp_path / "run")
    assert compiled.losses == pytest.approx(run.losses, rel=1e-3)
    load_checkpoint(compiled.final)


# Gradients that are not finite


@pytest.mark.usefixtures("narrow_network")
@pytest.mark.parametrize("log_every", [1, 3, 10])  # 10: the checkpoint of step 6 comes first
def test_a_gradient_that_is_not_finite_stops_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """In the fifth step a gradient overflows; the weights saved are those from before it, the batch is its batch."""
    config = dataclasses.replace(SMALL, epochs=3, log_every=log_every)
    seen: list[Batch] = []
    weights: list[dict[str, torch.Tensor]] = []
    inputs = Pretraining.inputs

    def watch(task: Pretraining, batch: Batch, mask_seed: int, seed: int) -> tuple[torch.Tensor, ...]:
        seen.append(batch)
        weights.append({name: value.clone() for name, value in task.model.state_dict().items()})
        pixels, mask = inputs(task, batch, mask_seed, seed)
        return pixels * (torch.inf if len(seen) == 5 else 1), mask

    source = open_source(photos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "inputs", watch)
        with pytest.raises(NonFiniteError, match="the gradients of step 5 are not finite; ") as refusal:
            train(Pretraining(config, source), source, tmp_path / "a run", Console(quiet=True))
    assert f"`mixmim replay '{tmp_path}/a run'`" in str(refusal.value)  # to be pasted into a shell
    folder = tmp_path / "a run" / "nonfinite"
    saved = read_checkpoint(folder / "weights.safetensors")[1]
    assert all(torch.equal(saved[name], weights[4][name]) for name in saved)
    report = json.loads((folder / "report.json").read_text())
    assert (report["step"], report["seed"], len(report["images"])) == (4, 0, 8)
    lines = replay(tmp_path / "a run")
    assert lines[0] == "step 5, 8 images, seed 0"
    assert re.match(r"bf16, part 1: loss .*, all outputs are finite, 0 gradients not finite", lines[1])  # not poisoned
    assert re.match(r"float32, part 1: loss .*", lines[2])

    def poison(task: Pretraining, batch: Batch, mask_seed: int, seed: int) -> tuple[torch.Tensor, ...]:
        assert torch.equal(batch.pixels_BHWC, seen[4].pixels_BHWC)
        pixels, mask = inputs(task, batch, mask_seed, seed)
        return pixels * torch.inf, mask

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "inputs", poison)
        assert re.search(
            r"loss nan, first in the output of model\.patch_embed\.norm, \d+ gradients", replay(tmp_path / "a run")[1]
        )

    lower = dataclasses.replace(config, base_lr=config.base_lr / 4)
    assert RunFolder(tmp_path / "a run").steps() == [3]  # nothing from after it
    said = io.StringIO()
    final = train(Pretraining(lower, source), source, tmp_path / "a run", Console(file=said, width=500), resume=True)
    assert f"resumed after step 3 with base_lr {lower.base_lr} (was {config.base_lr})" in said.getvalue()
    changes = [{"step": 3, "base_lr": [config.base_lr, lower.base_lr]}]
    assert json.loads((tmp_path / "a run" / "config.json").read_text())["changes"] == changes
    assert final is not None
    assert read_description(final).provenance["changes"] == changes
    rates = {
        line["step"]: line["lr"]
        for line in map(json.loads, (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines())
    }
    assert rates[9] == pytest.approx(learning_rate(8 / 3, lower))


def test_a_run_without_such_a_step_has_nothing_to_replay(run: Run) -> None:
    with pytest.raises(DataError, match="holds no saved step"):
        replay(run.path)


# Refusals


def test_a_run_folder_with_something_in_it_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of another run\n")
    with pytest.raises(ConfigError, match=r"is not empty: choose another folder .* --resume, .* --overwrite; nothing"):
        run_pretraining(SMALL, photos, tmp_path)
    with pytest.raises(ConfigError, match=r"is not a run folder \(no config.json\): nothing was overwritten"):
        run_pretraining(SMALL, photos, tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", ".lock"}
    assert (tmp_path / "metrics.jsonl").read_text() == "of another run\n"


@pytest.mark.usefixtures("narrow_network")
def test_overwriting_leaves_nothing_of_the_old_run(photos: Path, tmp_path: Path) -> None:
    run = run_pretraining(SMALL, photos, tmp_path / "fresh")
    old = run_pretraining(dataclasses.replace(SMALL, epochs=3, seed=5), photos, tmp_path / "run")
    (old.path / "unreadable.txt").write_text("of the old run\n")
    new = run_pretraining(SMALL, photos, tmp_path / "run", overwrite=True)
    assert new.losses == run.losses
    assert {path.name for path in (new.path / "checkpoints").iterdir()} == {
        path.name for path in (run.path / "checkpoints").iterdir()
    }
    assert not (new.path / "unreadable.txt").exists()


HOLD = """
import sys, time
from pathlib import Path
from training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("narrow_network")
def test_a_second_run_in_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="is in use by another run: wait for it, or choose another --out"):
                run_pretraining(SMALL, photos, tmp_path / "run", **options)
    finally:
        holder.kill()
        holder.communicate()
    time.sleep(0.1)
    run_pretraining(SMALL, photos, tmp_path / "run")  # the lock dies with its process


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import training_data
from mixmim_serve.errors import MixMIMError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    training_data.run_pretraining(training_data.SMALL, Path(sys.argv[1]), Path(sys.argv[2]), resume=True)
except MixMIMError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_a_full_disk_loses_nothing(run: Run, photos: Path, tmp_path: Path) -> None:
    """Files may grow to 30 MB: the weights of a checkpoint fit (25 MB), its optimiser (50 MB) does not."""
    with killed_in(3):
        run_pretraining(SMALL, photos, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "step-00000003.state.pt").read_bytes()
    limited = FULL_DISK.replace("try:", "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000))\ntry:")
    command = [sys.executable, "-c", limited, str(photos), str(tmp_path / "run")]
    environment = {"PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert re.search(r"could not write .*step-00000006: .*; earlier checkpoints are intact: free some space", sentence)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000003.state.pt").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.tmp"))
    again = run_pretraining(SMALL, photos, tmp_path / "run", resume=True)
    assert again.losses == run.losses


def test_sources_with_too_little_are_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    large = dataclasses.replace(SMALL, batch_size=32)
    for images in (photos, tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(DataError):
            run_pretraining(large, images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("narrow_network")
def test_too_many_unreadable_images_stop_the_run(spoilt: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"{number}.jpg").write_text("no image")
    with pytest.raises(
        DataError, match=r"[678] of the 8 images in .* could not be read, more than max_unreadable=0.1 allows"
    ):
        run_pretraining(SMALL, tmp_path / "images", tmp_path / "run")
    assert 6 <= len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) <= 8
    assert not (tmp_path / "run" / "final.safetensors").exists()
    strict = dataclasses.replace(SMALL, max_unreadable=0.05)  # two of 24 are more than that
    with pytest.raises(DataError, match=r"2 of the 24 images"):
        run_pretraining(strict, spoilt, tmp_path / "strict")


def test_an_unknown_tracker_is_refused_first(photos: Path, tmp_path: Path) -> None:
    source = open_source(photos)
    with pytest.raises(ConfigError, match="unknown tracker 'comet': choose mlflow or wandb"):
        train(Pretraining(SMALL, source), source, tmp_path / "run", Console(quiet=True), trackers=["comet"])
    assert not (tmp_path / "run").exists()
