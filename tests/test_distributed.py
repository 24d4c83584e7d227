"""Two processes with gloo on the CPU give what one gives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from training_data import SMALL, run_pretraining

import training.trainer
from mixmim_serve.sources import open_source
from training.distributed import World, join_world
from training.pretraining import Pretraining
from training.run_folder import RunFolder
from training.trainer import Trainer

# The same mask in each process, so that both halves make one batch; what is done is chosen by the first argument.
SCRIPT = """
import dataclasses, sys
from pathlib import Path
import torch
from rich.console import Console
from safetensors.torch import save_file
import training.trainer
from mixmim_serve.sources import open_source
from training.augment import step_seed
from training.distributed import join_world
from training.pretraining import Pretraining
from training.run_folder import RunFolder
from training.trainer import Trainer, train
from training_data import SMALL

what, photos, out, shard = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "shard"
config = dataclasses.replace(SMALL, shard=shard, accumulate=2 if what == "accumulate" else 1)
source = open_source(photos)
if what != "own-masks":
    training.trainer.step_seed = lambda seed, step, rank, *part: step_seed(seed, step, 0, *part)
if what == "long":
    config = dataclasses.replace(config, epochs=500)
    train(Pretraining(config, source), source, out, Console(quiet=True))
    sys.exit()
if what == "run":
    train(Pretraining(config, source), source, out, Console(quiet=True), resume=(out / "config.json").exists())
    sys.exit()
with join_world() as world:
    trainer = Trainer(Pretraining(config, source), source, RunFolder(out), world)
    if what == "own-masks":
        batch = next(iter(trainer.loader))
        seeds = [step_seed(0, step, world.rank) for step in range(8)]
        seen = [trainer.task.inputs(batch, seed, 0)[1] for seed in seeds]
        save_file({"masks": torch.cat(seen)}, out / f"masks-{world.rank}.safetensors")
    else:
        loader = iter(trainer.loader)
        trainer.set_learning_rate(1)
        loss, norm = trainer.train_step(next(loader) for _ in range(config.accumulate))
        loss = world.mean(loss)
        whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found = {name: whole(parameter.grad).contiguous() for name, parameter in trainer.model.named_parameters()}
        found |= {"loss": loss, "norm": norm}
        if world.main:
            save_file(found, out / "gradients.safetensors")
"""


def command(what: str, photos: Path, out: Path, shard: bool = False) -> dict[str, Any]:
    """SCRIPT in two processes, for `subprocess`."""
    out.mkdir(exist_ok=True)
    (out.parent / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(out.parent / "script.py"), what, str(photos), str(out), "shard" if shard else ""]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *launcher, *arguments], "env": environment}


def torchrun(what: str, photos: Path, out: Path, shard: bool = False) -> None:
    """Run SCRIPT; it must end well."""
    options = command(what, photos, out, shard)
    done = subprocess.run(**options, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Gradients, loss and norm of one step of one process."""
    with join_world() as world:
        assert world == World(0, 1, world.device)
        source = open_source(photos)
        trainer = Trainer(Pretraining(SMALL, source), source, RunFolder(tmp_path_factory.mktemp("alone")), world)
        trainer.set_learning_rate(1)
        loss, norm = trainer.train_step([next(iter(trainer.loader))])
        found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        return found | {"loss": loss, "norm": norm}


@pytest.mark.parametrize(("what", "shard"), [("step", False), ("accumulate", False), ("step", True)])
def test_two_processes_give_the_gradients_of_one(
    alone: dict[str, torch.Tensor], photos: Path, tmp_path: Path, what: str, shard: bool
) -> None:
    torchrun(what, photos, tmp_path / "out", shard)
    found = load_file(tmp_path / "out" / "gradients.safetensors")
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        largest = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5 * largest, msg=f"{name} differs")


@pytest.mark.parametrize("shard", [False, True])
def test_a_whole_run_of_two_processes_and_its_resumption(photos: Path, tmp_path: Path, shard: bool) -> None:
    torchrun("run", photos, tmp_path / "run", shard)
    one = run_pretraining(SMALL, photos, tmp_path / "one")
    folder = tmp_path / "run"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(one.losses, rel=1e-4)
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert (folder / "samples" / "reconstructions-epoch-0002.png").exists()
    whole = load_file(folder / "final.safetensors")
    # As if killed in the second epoch: the first epoch's checkpoint is all that is left.
    for name in ("final.safetensors", "checkpoints/step-00000006.state.pt", "checkpoints/step-00000006.safetensors"):
        (folder / name).unlink()
    torchrun("run", photos, folder, shard)
    assert [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == losses
    again = load_file(folder / "final.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_sigterm_to_the_launcher_saves_in_all_processes(photos: Path, tmp_path: Path) -> None:
    """The processes hear of it at different times, and must agree on a last step."""
    process = subprocess.Popen(**command("long", photos, tmp_path / "run"), stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not (tmp_path / "run" / "final.safetensors").exists()
    steps = [int(path.name[5:13]) for path in (tmp_path / "run" / "checkpoints").glob("*.state.pt")]
    assert max(steps) == len(log.read_text().splitlines())  # the last line of the log is the last step saved
    assert torch.load(tmp_path / "run" / "checkpoints" / f"step-{max(steps):08d}.state.pt")["step"] == max(steps)


def test_each_process_draws_its_own_masks(photos: Path, tmp_path: Path) -> None:
    torchrun("own-masks", photos, tmp_path / "out")
    one, two = (load_file(tmp_path / "out" / f"masks-{rank}.safetensors")["masks"] for rank in (0, 1))
    assert one.shape == two.shape == (8, 4)
    assert not torch.equal(one, two)


def test_images_are_shared_out(photos: Path) -> None:
    """Each process's loader gives its own half of every batch."""
    source = open_source(photos)
    seen = []
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"))
        config = dataclasses.replace(SMALL)
        loader, _ = training.trainer.build_loader(
            training.trainer.TrainingImages(source, 64, config), config, world.rank, world.size
        )
        seen.append([batch.pixels_BHWC for batch in loader])
    assert all(batch.shape[0] == 4 for half in seen for batch in half)
    images = {bytes(image.numpy().tobytes()) for half in seen for batch in half for image in batch}
    assert len(images) == 24
