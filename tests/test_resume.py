"""A run interrupted at any point and in any way, then resumed, is bit-equal to an uninterrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import shutil
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
from training_data import MEASURED, NARROW, Killed, killed_in

from mixmim_serve.description import read_description
from mixmim_serve.errors import CheckpointError, ConfigError, DataError, ResourceError
from mixmim_serve.signals import stop_signals
from mixmim_serve.sources import open_source
from training.config import PretrainConfig
from training.data import Batch
from training.pretraining import Pretraining
from training.trainer import Trainer, train

# 12 photos in batches of 4: three steps per epoch, a log line every second step, so lines span epochs.
SMALL = dataclasses.replace(training_data.SMALL, epochs=3, batch_size=4, base_lr=3e-2, log_every=2)
STEPS = 9


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


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted; read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.config.architecture", lambda _: NARROW)
        assert run(photos, folder) is not None
    return folder


@pytest.fixture
def whole_copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that a test may alter."""
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def metrics(path: Path) -> list[dict[str, float]]:
    """The log lines without the speed."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def assert_same(path: Path, whole: Path) -> None:
    assert metrics(path) == metrics(whole)
    for name in ("final.safetensors", "checkpoints/step-00000003.safetensors", "checkpoints/step-00000006.safetensors"):
        one, other = load_file(path / name), load_file(whole / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    one_said, other_said = (read_description(run / "final.safetensors") for run in (path, whole))
    assert one_said.provenance["loss"] == other_said.provenance["loss"]
    assert one_said.arch == other_said.arch


@pytest.mark.parametrize("step", range(STEPS))
def test_killed_in_any_step(photos: Path, tmp_path: Path, whole: Path, step: int) -> None:
    with killed_in(step):
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
    ended = step == STEPS  # the last step: the run is over
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_signal)
        assert (run(photos, tmp_path / "run") is not None) == ended
    assert signal.getsignal(signal.SIGTERM) is before
    state = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.state.pt"
    assert torch.load(state, weights_only=True)["step"] == step
    assert (tmp_path / "run" / "final.safetensors").exists() == ended
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


# For each line it gets, a run in a process of its own, forked after what takes seconds is imported.
RUNS = """
import json, os, sys, time
from pathlib import Path
import torch._dynamo, torch.utils.tensorboard
import test_resume
import training.config
from training.trainer import Trainer

for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
photos, path, workers, errors = json.loads(line)
os.setsid()
os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
training.config.architecture = lambda _: test_resume.NARROW
step = Trainer.train_step
Trainer.train_step = lambda *arguments: time.sleep(0.2) or step(*arguments)
config = test_resume.dataclasses.replace(test_resume.SMALL, workers=workers)
sys.exit(test_resume.run(Path(photos), Path(path), config=config) is not None)
"""


@pytest.fixture(scope="module")
def runs() -> Iterator[subprocess.Popen[bytes]]:
    """A process of RUNS."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", RUNS], env=environment, stdin=pipe, stdout=pipe, bufsize=0) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@dataclasses.dataclass
class Process:
    """A run in a session of its own; `code` is None until it has ended."""

    runs: subprocess.Popen[bytes]
    pid: int
    errors: Path
    code: int | None = None

    def wait(self, seconds: float = 30) -> int | None:
        """The exit code."""
        if self.code is None and select.select([self.runs.stdout], [], [], seconds)[0]:
            assert self.runs.stdout is not None
            self.code = int(self.runs.stdout.readline())
        return self.code


Start = Callable[..., contextlib.AbstractContextManager[Process]]


@pytest.fixture
def process_of(runs: subprocess.Popen[bytes]) -> Start:
    @contextlib.contextmanager
    def process_of(photos: Path, path: Path, workers: int = 0) -> Iterator[Process]:
        """A run in a process, once its log has a line."""
        assert runs.stdin is not None
        assert runs.stdout is not None
        errors, log = path.with_name("errors"), path / "metrics.jsonl"
        runs.stdin.write(json.dumps([str(photos), str(path), workers, str(errors)]).encode() + b"\n")
        process = Process(runs, int(runs.stdout.readline()), errors)
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and process.wait(0.02) is None and time.monotonic() < deadline:
            pass
        try:
            yield process
        finally:
            if process.code is None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, signal.SIGKILL)
                process.wait()

    return process_of


INTERRUPT = pytest.param(signal.SIGINT, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, INTERRUPT])
def test_a_real_process_and_a_real_signal(
    photos: Path, tmp_path: Path, whole: Path, process_of: Start, number: signal.Signals
) -> None:
    with process_of(photos, tmp_path / "run") as process:
        os.kill(process.pid, number)
        assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.skipif(sys.platform != "linux", reason="a worker cannot tell there who sends SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, INTERRUPT])
def test_a_signal_to_every_process_of_a_run(
    photos: Path, tmp_path: Path, whole: Path, process_of: Start, number: signal.Signals
) -> None:
    """As systemd, Slurm and a terminal send it: the workers go on until the run has saved."""
    with process_of(photos, tmp_path / "run", workers=2) as process:
        os.killpg(process.pid, number)
        assert process.wait() == 0
        with pytest.raises(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, 0)
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, b"ResourceError: a decoding process was killed, most likely for lack of memory: lower"),
        (signal.SIGBUS, b"ResourceError: the 2 decoding processes have too little shared memory: give"),
    ],
)
def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(
    photos: Path, tmp_path: Path, whole: Path, process_of: Start, number: signal.Signals, message: bytes
) -> None:
    with process_of(photos, tmp_path / "run", workers=2) as process:
        psutil.Process(process.pid).children()[0].send_signal(number)
        assert process.wait() == 1
        assert message in process.errors.read_bytes()
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


class Cut:
    """Lets a run go on until it has changed so many files in `checkpoints`, then kills it."""

    def __init__(self, patch: pytest.MonkeyPatch, changes: int) -> None:
        self.left = changes
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, self.counted(getattr(Path, name)))

    def counted(self, change: Callable[..., object]) -> Callable[..., object]:
        def counted(path: Path, *arguments: object, **options: bool) -> object:
            if path.parent.name == "checkpoints" and (path.exists() or not options):
                if not self.left:
                    raise Killed
                self.left -= 1
            return change(path, *arguments, **options)

        return counted


@pytest.mark.parametrize("changes", range(2, 10))
def test_killed_between_any_two_files_of_a_checkpoint(photos: Path, tmp_path: Path, whole: Path, changes: int) -> None:
    """Two files are written for each of three checkpoints, then the state before is deleted, later old weights too."""
    config = dataclasses.replace(SMALL, keep_last=1, keep_every=1000)
    with pytest.MonkeyPatch.context() as patch:
        Cut(patch, changes)
        with pytest.raises(Killed):
            run(photos, tmp_path / "run", config=config)
    left = {path.suffix: 0 for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert left.keys() == {".safetensors", ".pt"}  # weights and a state at any moment
    assert run(photos, tmp_path / "run", config=config, resume=True) is not None
    assert metrics(tmp_path / "run") == metrics(whole)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.name.startswith("."))
    assert kept == ["step-00000009.safetensors", "step-00000009.state.pt"]


def test_a_folder_of_an_earlier_version_is_resumed_and_tidied(photos: Path, tmp_path: Path, whole: Path) -> None:
    """It has a state for each checkpoint that is kept."""
    with killed_in(7):
        run(photos, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copy(checkpoints / "step-00000006.state.pt", checkpoints / "step-00000003.state.pt")
    assert run(photos, tmp_path / "run", resume=True) is not None
    assert_same(tmp_path / "run", whole)
    assert [path.name for path in checkpoints.glob("*.state.pt")] == ["step-00000009.state.pt"]


def test_a_finished_run_stays_as_it_is(photos: Path, whole_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_copy.rglob("*")}
    assert run(photos, whole_copy, resume=True) == whole_copy / "final.safetensors"
    assert {path: path.stat().st_mtime_ns for path in whole_copy.rglob("*")} == before


def test_what_cannot_be_resumed_is_refused(photos: Path, tmp_path: Path, whole_copy: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        run(photos, tmp_path / "nowhere", resume=True)
    (whole_copy / "final.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"was started with epochs 3 \(now 4\): resume it with its original options"):
        run(photos, whole_copy, config=dataclasses.replace(SMALL, epochs=4), resume=True)
    (tmp_path / "others").mkdir()
    for path in sorted(photos.glob("*.jpg"))[:8]:
        (tmp_path / "others" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="was started with other images than those in"):
        run(tmp_path / "others", whole_copy, resume=True)
    last = whole_copy / "checkpoints" / "step-00000009.state.pt"
    whole_state = last.read_bytes()
    last.write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"step-00000009 is damaged: start .* go on from the weights of step 6"):
        run(photos, whole_copy, resume=True)
    (whole_copy / "checkpoints" / "step-00000006.state.pt").write_bytes(whole_state)  # as earlier versions kept it
    with pytest.raises(CheckpointError, match=r"step-00000009 is damaged: delete its two files to resume from the one"):
        run(photos, whole_copy, resume=True)
    assert not (whole_copy / "final.safetensors").exists()
