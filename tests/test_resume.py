"""A run that was interrupted, anywhere and in any way, and resumed is to the last bit a run that was not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import training_data
from conftest import REPOSITORY
from rich.console import Console
from safetensors.torch import load_file
from training_data import MEASURED

from mixmim_serve.config import Architecture, DecoderConfig
from mixmim_serve.description import read_description
from mixmim_serve.errors import CheckpointError, ConfigError, DataError, ResourceError
from mixmim_serve.signals import stop_signals
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.data import Batch
from training.pretraining import Pretraining
from training.trainer import Trainer, train

# 12 photos in batches of 4: three steps an epoch, a line of the log every second step, so lines span epochs.
SMALL = dataclasses.replace(training_data.SMALL, epochs=3, batch_size=4, base_lr=3e-2, log_every=2)
STEPS = 9
NARROW = Architecture(8, (1, 1, 1, 1), (1, 1, 1, 1), 64, decoder=DecoderConfig(16, 1, 2))


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


@pytest.fixture(scope="module")
def photos() -> Path:
    return REPOSITORY / "examples"


def run(photos: Path, path: Path, *, config: PretrainConfig = SMALL, resume: bool = False) -> Path | None:
    source = open_source(photos)
    return train(Pretraining(config, source), source, path, Console(file=io.StringIO()), resume=resume)


@pytest.fixture
def whole(photos: Path, tmp_path: Path) -> Path:
    """A run that nobody interrupted."""
    assert run(photos, tmp_path / "whole") is not None
    return tmp_path / "whole"


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines of the log but for the speed."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def assert_same(path: Path, whole: Path) -> None:
    assert metrics(path) == metrics(whole)
    for name in ("final.safetensors", "checkpoints/step-00000003.safetensors", "checkpoints/step-00000006.safetensors"):
        one, other = load_file(path / name), load_file(whole / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    one_said, other_said = (read_description(each / "final.safetensors") for each in (path, whole))
    assert one_said.provenance["loss"] == other_said.provenance["loss"]
    assert one_said.arch == other_said.arch


class Killed(BaseException):
    """Nothing in the code catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("step", range(STEPS))
def test_killed_in_any_step(photos: Path, tmp_path: Path, whole: Path, step: int) -> None:
    steps: Iterator[int] = iter(range(STEPS))
    train_step = Trainer.train_step

    def step_until(trainer: Trainer, parts: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        if next(steps) == step:
            raise Killed
        return train_step(trainer, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_until)
        with pytest.raises(Killed):
            run(photos, tmp_path / "run")
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [1, 2, 3, 8, 9])
def test_ended_by_sigterm_after_any_step(photos: Path, tmp_path: Path, whole: Path, step: int) -> None:
    train_step = Trainer.train_step

    def step_and_signal(trainer: Trainer, parts: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, parts)

    before = signal.getsignal(signal.SIGTERM)
    ended = step == STEPS  # the last step: nothing is left to be stopped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_signal)
        assert (run(photos, tmp_path / "run") is not None) == ended
    assert signal.getsignal(signal.SIGTERM) is before
    state = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.state.pt"
    assert torch.load(state, weights_only=True)["step"] == step
    assert (tmp_path / "run" / "final.safetensors").exists() == ended
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


IN_PROCESS = """
import sys, time
from pathlib import Path
import test_resume
import training.config
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.trainer import Trainer, train
training.config.architecture = lambda _: test_resume.NARROW
step = Trainer.train_step
Trainer.train_step = lambda *arguments: time.sleep(0.2) or step(*arguments)
source = open_source(sys.argv[1])
config = test_resume.dataclasses.replace(test_resume.SMALL, workers=int(sys.argv[3]))
sys.exit(train(Pretraining(config, source), source, Path(sys.argv[2])) is not None)
"""


@contextlib.contextmanager
def process_of(photos: Path, path: Path, workers: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a session of its own, once its log has a line."""
    command = [sys.executable, "-c", IN_PROCESS, str(photos), str(path), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    log = path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_real_process_and_a_real_signal(photos: Path, tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    with process_of(photos, tmp_path / "run") as process:
        process.send_signal(number)
        assert process.wait(timeout=30) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.skipif(sys.platform != "linux", reason="a worker cannot tell there who sends SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_run(photos: Path, tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    """As systemd, Slurm and a terminal send it: the workers go on until the run has saved."""
    with process_of(photos, tmp_path / "run", workers=2) as process:
        os.killpg(process.pid, number)
        assert process.wait(timeout=30) == 0
        with pytest.raises(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, 0)
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, b"ResourceError: a decoding process was killed, most likely for its memory: lower"),
        (signal.SIGBUS, b"ResourceError: the 2 decoding processes have too little shared memory: give"),
    ],
)
def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(
    photos: Path, tmp_path: Path, whole: Path, number: signal.Signals, message: bytes
) -> None:
    with process_of(photos, tmp_path / "run", workers=2) as process:
        psutil.Process(process.pid).children()[0].send_signal(number)
        assert message in process.communicate(timeout=30)[1]
        assert process.returncode == 1
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "exhaust", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: _raise(torch.OutOfMemoryError("of CUDA"))]
)
def test_too_little_memory_ends_a_run_with_a_sentence(
    photos: Path, tmp_path: Path, exhaust: Callable[[], object]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: exhaust())
        with pytest.raises(
            ResourceError, match=r"^not enough memory for 4 images at a time: --set accumulate=2 halves"
        ):
            run(photos, tmp_path / "run")


def _raise(error: Exception) -> None:
    raise error


def test_another_error_of_torch_stays_as_it_is(photos: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: _raise(RuntimeError("shapes differ")))
        with pytest.raises(RuntimeError, match="shapes differ"):
            run(photos, tmp_path / "run")


def test_ctrl_c_twice_ends_a_run_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals(signal.SIGINT) as stopping:  # noqa: PT012
        for after in (0.0, 0.1, 1.2):  # the second one is torchrun's
            time.sleep(after)
            assert stopping.is_set() == (after > 0)
            signal.raise_signal(signal.SIGINT)


def test_a_log_line_that_was_cut_is_written_again(photos: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(photos, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    run(photos, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_finished_run_stays_as_it_is(photos: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run(photos, whole, resume=True) == whole / "final.safetensors"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_what_cannot_be_resumed_is_refused(photos: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        run(photos, tmp_path / "nowhere", resume=True)
    (whole / "final.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"was started with epochs 3 \(now 4\): resume it with the options"):
        run(photos, whole, config=dataclasses.replace(SMALL, epochs=4), resume=True)
    (tmp_path / "others").mkdir()
    for path in sorted(photos.glob("*.jpg"))[:8]:
        (tmp_path / "others" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="was started with other images than those in"):
        run(tmp_path / "others", whole, resume=True)
    (whole / "checkpoints" / "step-00000009.state.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"step-00000009 is damaged: delete its two files to resume from the one"):
        run(photos, whole, resume=True)
    assert not (whole / "final.safetensors").exists()
