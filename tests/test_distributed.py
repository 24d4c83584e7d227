"""Two processes with gloo on the CPU give what one gives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from training_data import NARROW, SMALL, Run, run_pretraining

import training.trainer
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.distributed import World, join_world
from training.pretraining import Pretraining
from training.run_folder import RunFolder
from training.trainer import Trainer

# Each argument after the first two is a job: its name, then its options, joined by commas. Jobs do not share a process,
# only the seconds until torch is imported.
SCRIPT = """
import dataclasses, os, shutil, sys, time
from pathlib import Path
import torch
import torch._dynamo, torch.utils.tensorboard  # what every job would import as it goes
from rich.console import Console
from safetensors.torch import save_file
import training.config, training.trainer
from mixmim_serve.sources import open_source
from training.augment import step_seed
from training.distributed import join_world
from training.pretraining import Pretraining
from training.run_folder import RunFolder
from training.trainer import Trainer, train
from training_data import NARROW, SMALL

source, base = open_source(sys.argv[1]), Path(sys.argv[2])


def the_same_masks(seed, step, rank, *part):
    return step_seed(seed, step, 0, *part)  # so that both halves make one batch


def run(out, config):
    training.config.architecture = lambda _: NARROW
    train(Pretraining(config, source), source, out, Console(quiet=True), resume=(out / "config.json").exists())


def again(out, config):
    if os.environ["RANK"] == "0":  # as if killed in the second epoch: the first epoch's checkpoint is all that is left
        copy = Path(shutil.copytree(base / out.name.replace("again", "run"), base / f".{out.name}"))
        for path in (copy / "final.safetensors", *copy.glob("checkpoints/step-00000006.*")):
            path.unlink()
        copy.rename(out)
    while not out.exists():
        time.sleep(0.01)
    run(out, config)


def masks(out, config):
    with join_world() as world:
        trainer = Trainer(Pretraining(config, source), source, RunFolder(out), world)
        batch = next(iter(trainer.loader))
        seeds = [step_seed(0, step, world.rank) for step in range(8)]
        seen = [trainer.task.inputs(batch, seed, 0)[1] for seed in seeds]
        save_file({"masks": torch.cat(seen)}, out / f"masks-{world.rank}.safetensors")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def averages(trainer, world):  # their largest difference between the processes
    average = trainer.task.objective.resume_state()["average"].values()
    return torch.stack([(world.mean(tensor.clone()) - tensor).abs().max() for tensor in average]).max()


def step(out, config):
    with join_world() as world:
        trainer = Trainer(Pretraining(config, source), source, RunFolder(out), world)
        loader = iter(trainer.loader)
        trainer.set_learning_rate(1)
        loss, norm = trainer.train_step(next(loader) for _ in range(config.accumulate))
        loss = world.mean(loss)
        found = {name: whole(parameter.grad).contiguous() for name, parameter in trainer.model.named_parameters()}
        found |= {"loss": loss, "norm": norm}
        if config.feature_weight:
            found["averages"] = averages(trainer, world)
        if world.main:
            save_file(found, out / "gradients.safetensors")


def do(job):
    what, *options = job.split(",")
    if what != "masks":
        training.trainer.step_seed = the_same_masks
    config = dataclasses.replace(SMALL, shard="shard" in options, accumulate=2 if "accumulate" in options else 1,
                                 epochs=5000 if "long" in options else SMALL.epochs,
                                 feature_weight=1.0 if "features" in options else 0.0)
    globals()[what](base / job, config)


*others, last = sys.argv[3:]
for number, job in enumerate(others):
    child = os.fork()
    if not child:  # torchrun's own store is for one group of processes
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=os.environ["PORTS"].split()[number])
        do(job)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{job} failed")
do(last)
"""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def command(photos: Path, base: Path, *jobs: str) -> dict[str, Any]:
    """SCRIPT in two processes, for `subprocess`; each job has a folder of its name."""
    for job in jobs:
        if not job.startswith("again"):
            (base / job).mkdir()
    (base / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(base / "script.py"), str(photos), str(base), *jobs]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment["PORTS"] = " ".join(str(free_port()) for _ in jobs)
    return {"args": [sys.executable, *launcher, *arguments], "env": environment}


STEPS = ("step", "step,accumulate", "step,shard")
RUNS = ("run", "run,shard", "again", "again,shard", "run,long")
JOBS = ("masks", *STEPS, "step,features", *RUNS)


@pytest.fixture(scope="module")
def together(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes do, in one launch, because a launch takes seconds; read-only.

    What needs it is slow: ten jobs of two processes keep both cores busy for half a minute.

    The last job would go on for minutes: its launcher is sent SIGTERM once there is a line in the log.
    """
    base = tmp_path_factory.mktemp("together")
    log, errors = base / "run,long" / "metrics.jsonl", base / "errors"
    with errors.open("wb") as file, subprocess.Popen(**command(photos, base, *JOBS), stderr=file) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        ended = process.poll() is not None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
    assert log.exists(), errors.read_text()[-3000:]
    assert not ended, errors.read_text()[-3000:]
    return base


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, torch.Tensor]:
    """Gradients, loss and norm of one step of one process."""
    return step_alone(SMALL, photos)


@pytest.fixture(scope="module")
def alone_with_features(photos: Path) -> dict[str, torch.Tensor]:
    """The same with predicted features."""
    return step_alone(dataclasses.replace(SMALL, feature_weight=1.0), photos)


def step_alone(config: PretrainConfig, photos: Path) -> dict[str, torch.Tensor]:
    with join_world() as world:
        assert world == World(0, 1, world.device)
        source = open_source(photos)
        trainer = Trainer(Pretraining(config, source), source, RunFolder(Path("unused")), world)
        trainer.set_learning_rate(1)
        loss, norm = trainer.train_step([next(iter(trainer.loader))])
        found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        return found | {"loss": loss, "norm": norm}


@pytest.mark.slow
@pytest.mark.parametrize("job", STEPS)
def test_two_processes_give_the_gradients_of_one(alone: dict[str, torch.Tensor], together: Path, job: str) -> None:
    assert_equal_steps(load_file(together / job / "gradients.safetensors"), alone)


@pytest.mark.slow
def test_two_processes_predict_features_as_one(alone_with_features: dict[str, torch.Tensor], together: Path) -> None:
    found = load_file(together / "step,features" / "gradients.safetensors")
    assert float(found.pop("averages")) == 0  # both processes hold the same average
    assert_equal_steps(found, alone_with_features)


def assert_equal_steps(found: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        largest = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5 * largest, msg=f"{name} differs")


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        return run_pretraining(SMALL, photos, tmp_path_factory.mktemp("one") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["", ",shard"])
def test_a_whole_run_of_two_processes_and_its_resumption(one: Run, together: Path, shard: str) -> None:
    folder, resumed = together / f"run{shard}", together / f"again{shard}"
    assert losses_of(folder) == pytest.approx(one.losses, rel=1e-4)
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert (folder / "samples" / "reconstructions-epoch-0002.png").exists()
    assert losses_of(resumed) == losses_of(folder)
    whole, again = (load_file(each / "final.safetensors") for each in (folder, resumed))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_in_all_processes(together: Path) -> None:
    """The processes hear of it at different times, and must agree on a last step."""
    folder = together / "run,long"
    assert not (folder / "final.safetensors").exists()
    steps = [int(path.name[5:13]) for path in (folder / "checkpoints").glob("*.state.pt")]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert max(steps) == len(lines)  # the last line of the log is the last step saved
    assert torch.load(folder / "checkpoints" / f"step-{max(steps):08d}.state.pt")["step"] == max(steps)


@pytest.mark.slow
def test_each_process_draws_its_own_masks(together: Path) -> None:
    one, two = (load_file(together / "masks" / f"masks-{rank}.safetensors")["masks"] for rank in (0, 1))
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
