"""When a run is compiled, what that changes, and how it is stopped. Only slow tests compile for real."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import training_data
from conftest import REPOSITORY
from rich.console import Console
from torch import nn
from training_data import MEASURED, NARROW, killed_in

from mixmim_serve.sources import open_source
from training.compiling import EXPECTED, SAVED, TIMED, Compiler, Decision
from training.config import PretrainConfig
from training.distributed import World
from training.meter import Meter, left_in_words
from training.pretraining import Pretraining
from training.recipes import FINETUNE, PRETRAIN
from training.trainer import train

# 12 photos in batches of 4: nine steps, three in an epoch.
SMALL = dataclasses.replace(training_data.SMALL, epochs=3, batch_size=4, base_lr=3e-2, log_every=1, compile="auto")
FIRST = TIMED + 1  # the step, counted from 0, before which `auto` decides
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def photos() -> Path:
    return REPOSITORY / "examples"


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a few thousand weights under the name `tiny`."""
    monkeypatch.setattr("training.config.architecture", lambda _: NARROW)


@pytest.fixture
def louder(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stands in for torch.compile: "compiled" losses are a tenth larger, and it always pays."""
    monkeypatch.setattr("training.compiling.can_compile", lambda _: True)
    monkeypatch.setattr("training.compiling.EXPECTED", -1.0)
    began: list[float] = []

    def compile_(module: nn.Module) -> Callable[..., Any]:
        began.append(time.monotonic())
        return lambda *inputs: module(*inputs) * 1.1

    monkeypatch.setattr("training.compiling.torch.compile", compile_)
    return began


def run(photos: Path, path: Path, config: PretrainConfig = SMALL, *, resume: bool = False) -> str:
    """What a run printed that must finish."""
    source, console = open_source(photos), Console(file=io.StringIO(), width=500)
    assert train(Pretraining(config, source), source, path, console, resume=resume) is not None
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def metrics(path: Path) -> list[dict[str, float]]:
    """The log lines without the speed."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


# The decision


def compiler_after(seconds: list[float], *, possible: bool = True) -> Compiler:
    compiler = Compiler(nn.Identity(), "auto", ALONE)
    compiler.seconds, compiler.possible = seconds, possible
    return compiler


def test_it_pays_when_what_the_steps_ahead_save_is_more_than_it_takes() -> None:
    enough = math.ceil(EXPECTED / SAVED / 2) + 1  # steps of two seconds
    for steps, expected in ((enough + 10, 10), (enough + 8, None)):
        compiler = compiler_after([9.0, 2.0, 2.1, 1.9])  # the first is slower and does not count
        decision = compiler.decide(10, steps)
        assert decision is not None
        assert decision.from_step == expected
        assert f"{steps - 10} steps of 2.00 s would take" in decision.why
        assert compiler.decide(11, steps) is None  # decided once
        assert Decision.of_run({"config": {"compile": "auto"}, **compiler.about()}) == decision


def test_it_waits_for_enough_steps_and_for_a_compiler() -> None:
    assert compiler_after([9.0, 2.0, 2.0]).decide(3, 10**6) is None
    decision = compiler_after([9.0, 2.0, 2.0, 2.0], possible=False).decide(4, 10**6)
    assert decision is not None
    assert decision.from_step is None
    assert "no C++ compiler found" in decision.why


@pytest.mark.parametrize(("wanted", "step"), [(True, 0), (False, None)])
def test_true_and_false_decide_by_themselves(wanted: bool, step: int | None) -> None:
    compiler = Compiler(nn.Identity(), wanted, ALONE)
    assert compiler.decision == Decision(step)
    assert compiler.about() == {}
    assert Decision.of_run({"config": {"compile": wanted}}) == Decision(step)
    assert Decision.of_run({"config": {"compile": "auto"}}) is None


def test_recipes_for_a_cpu_leave_it_open() -> None:
    assert {name: make().compile for name, make in (PRETRAIN | FINETUNE).items()} == {
        "base-600ep": True, "tiny-cpu": "auto", "tiny-continue-cpu": "auto",
        "base-finetune-100ep": True, "tiny-finetune-cpu": "auto",
    }  # fmt: skip


# Runs


def test_a_short_run_stays_eager(photos: Path, tmp_path: Path) -> None:
    said = run(photos, tmp_path / "auto")
    assert re.search(r"not compiling: 5 steps of \d\.\d\d s would take \d s less, compiling 120 s more", said)
    run(photos, tmp_path / "false", dataclasses.replace(SMALL, compile=False))
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "false")
    assert about(tmp_path / "auto")["compilation"]["from_step"] is None
    assert "compilation" not in about(tmp_path / "false")


@pytest.mark.usefixtures("louder")
def test_a_long_run_changes_over_at_a_step(photos: Path, tmp_path: Path) -> None:
    said = run(photos, tmp_path / "auto")
    assert "compiling: a minute or two is usual" in said
    assert "compiled in 0 s" in said
    run(photos, tmp_path / "false", dataclasses.replace(SMALL, compile=False))
    one, other = metrics(tmp_path / "auto"), metrics(tmp_path / "false")
    assert one[:FIRST] == other[:FIRST]
    assert one[FIRST]["loss"] == pytest.approx(1.1 * other[FIRST]["loss"], rel=1e-5)
    assert about(tmp_path / "auto")["compilation"]["from_step"] == FIRST


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
@pytest.mark.usefixtures("louder")
def test_a_resumed_run_changes_over_at_the_same_step(photos: Path, tmp_path: Path, step: int) -> None:
    run(photos, tmp_path / "whole")
    with killed_in(step):
        run(photos, tmp_path / "run")
    run(photos, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert about(tmp_path / "run")["compilation"]["from_step"] == FIRST


@pytest.mark.usefixtures("louder")
def test_a_run_of_before_goes_on_as_it_began(photos: Path, tmp_path: Path) -> None:
    """The recipes said `compile=true` then; the same command resumes such a run without a change."""
    for then in (True, False):
        before = dataclasses.replace(SMALL, compile=then)
        run(photos, tmp_path / f"whole-{then}", before)
        with killed_in(4):
            run(photos, tmp_path / f"{then}", before)
        said = run(photos, tmp_path / f"{then}", resume=True)
        assert "resumed after step 3" in said
        assert "with compile" not in said
        assert metrics(tmp_path / f"{then}") == metrics(tmp_path / f"whole-{then}")


def test_the_plan_says_that_there_is_no_compiler(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.meter.shutil.which", lambda _: None)
    said = run(photos, tmp_path / "run", dataclasses.replace(SMALL, compile=True))
    assert "3 epochs of 3 steps; no C++ compiler found, so torch.compile is off, which is slower" in said


# Time


def test_the_time_of_compiling_is_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("training.meter.time.perf_counter", lambda: now)
    meter, one = Meter(since=0.0), torch.tensor(1.0)
    now = 2.0
    meter.add(one, one, 64)
    with meter.uncounted():
        now, meter.waited = 302.0, 1.0
        meter.add(one, one, 64)
    now = 304.0
    meter.add(one, one, 64)
    read = meter.read(3, 1.0, 0.1, ALONE)
    assert (read.rate, read.waiting, read.loss) == (32, 0, 1)  # two steps of two seconds


@pytest.mark.usefixtures("louder")
def test_a_line_of_nothing_but_compiling_has_no_rate(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rate"] > 0 for line in lines] == [line["step"] != FIRST + 1 for line in lines]


def test_remaining_time_follows_the_rate() -> None:
    assert left_in_words(64 * 100, 16.0) == "0:06:40"
    assert left_in_words(64 * 100, 0.0) == ""


def test_signs_of_life(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.compiling.can_compile", lambda _: True)
    monkeypatch.setattr("training.compiling.BEAT", 0.05)

    def compile_(module: nn.Module) -> Callable[..., Any]:
        def first(*inputs: Any) -> Any:
            time.sleep(0.3)
            return module(*inputs)

        return first

    monkeypatch.setattr("training.compiling.torch.compile", compile_)
    config = dataclasses.replace(SMALL, compile=True, epochs=1, warmup_epochs=0)
    said = run(photos, tmp_path / "run", config)
    assert re.search(r"compiling: a minute.*compiling, 0 s so far; a minute or two is usual.*compiled in", said, re.S)


# Signals

SCRIPT = """
import subprocess, sys, threading
from pathlib import Path
import test_compiling, torch, training.compiling, training.config
from rich.console import Console
from mixmim_serve.sources import open_source
from training.pretraining import Pretraining
from training.trainer import train

def compile_(module):
    def forever(*inputs):
        print("compiling", flush=True)
        # as torch does: C++ compilers below threads, while the main thread waits
        threads = [threading.Thread(target=subprocess.call, args=(["sleep", "60"],)) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    return forever

photos, path, real = sys.argv[1:]
if real == "fake":
    training.config.architecture = lambda _: test_compiling.NARROW
    training.compiling.torch.compile = compile_
    training.compiling.can_compile = lambda _: True
config = test_compiling.dataclasses.replace(test_compiling.SMALL, compile=True, workers=1, image_size=128)
source = open_source(photos)
final = train(Pretraining(config, source), source, Path(path), Console(file=sys.stdout, width=200))
print("trained" if final else "stopped", flush=True)
"""


@pytest.fixture
def compiling(photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, in the middle of compiling."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    environment |= {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", SCRIPT, str(photos), str(tmp_path / "run"), request.param]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        while "compiling" not in (line := process.stdout.readline()):
            assert line, "it ended before"
        yield process
        process.kill()


def everyone_below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def in_the_middle(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Who is below the run, as soon as compilers are, or after ten seconds, in which torch traces the network."""
    deadline = time.monotonic() + 10
    while True:
        below = everyone_below(process)
        if time.monotonic() > deadline or any(each.name() in ("sleep", "cc1plus") for each in below):
            return below
        time.sleep(0.1)


REAL = pytest.param("real", marks=pytest.mark.slow)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the compiler's processes in /proc")
@pytest.mark.parametrize("compiling", ["fake", REAL], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_compiling_at_once_and_leaves_nobody(
    compiling: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    below = in_the_middle(compiling)
    began = time.monotonic()
    compiling.send_signal(number)
    said = compiling.communicate(timeout=30)[0]
    assert time.monotonic() - began < 25  # what it waited for takes a minute
    assert compiling.returncode == 0
    assert "stopped while compiling; the same command and --resume continue" in said
    assert said.endswith("stopped\n")
    _, alive = psutil.wait_procs(below, timeout=2)
    assert not alive
    assert about(tmp_path / "run")["task"] == "pretrain"  # it can be resumed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about its own parts
def test_a_compiled_run_resumes_exactly(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.compiling.EXPECTED", -1.0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run(photos, tmp_path / "whole")
    with killed_in(5):
        run(photos, tmp_path / "run")
    torch._dynamo.reset()
    run(photos, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert list((tmp_path / "cache").iterdir())  # kept between runs
