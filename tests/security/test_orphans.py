"""Processes whose parent is killed: none stays behind to hold a lock, memory or a device."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import test_jobs
import test_resume
from test_jobs import ask_json, has_ended, process_of, until
from test_server import Server, serve

from mixmim_serve.locks import lock_folder

root, many = test_jobs.root, test_jobs.many
runs, start_run = test_resume.runs, test_resume.process_of

# The parent ends before, or while, its child asks to die with it.
EARLY = """
import os, sys, time
from mixmim_serve.signals import die_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.001)
die_with_parent(parent)
print("still there", flush=True)
"""


def killed_children(process: subprocess.Popen[bytes] | test_resume.Process) -> list[psutil.Process]:
    """Kill a process; its children as they were."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return children


@contextlib.contextmanager
def at_work(bundle: Path, root: Path, many: str, folder: Path) -> Iterator[tuple[Server, psutil.Process]]:
    """A server and the process of its job, which is under way."""
    with serve(bundle, folder, f"jobs_dir={folder / 'jobs'}", jobs_root=root) as server:
        server.wait_until_ready()
        assert ask_json(server, f'{{"source": "{many}", "options": {{"batch": 1}}}}'.encode()) == 201
        until(lambda: server.ask("GET", "/jobs")[1], lambda jobs: b'"seconds_left"' in jobs)
        yield server, process_of(server.process.pid)


@pytest.mark.parametrize("turn", range(2))
def test_a_killed_run_can_be_resumed_at_once(tmp_path: Path, start_run: test_resume.Start, turn: int) -> None:
    with start_run(test_resume.REPOSITORY / "examples", tmp_path / "run", workers=2) as process:
        workers = killed_children(process)
        assert len(workers) >= 2
        time.sleep(0.2)
        lock_folder(tmp_path / "run").release()
        assert all(map(has_ended, workers))


def test_a_worker_whose_parent_has_ended_already_ends() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, timeout=30)
    assert done.stdout == b""


def test_the_process_of_a_job_ends_with_its_server(
    exported_bundle: Path, root: Path, many: str, tmp_path: Path
) -> None:
    with at_work(exported_bundle, root, many, tmp_path) as (server, worker):
        assert killed_children(server.process)
        time.sleep(0.2)
        assert has_ended(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_the_process_of_a_job_is_the_first_to_go_when_memory_runs_out(
    exported_bundle: Path, root: Path, many: str, tmp_path: Path
) -> None:
    with at_work(exported_bundle, root, many, tmp_path) as (server, worker):
        assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text() == "1000\n"
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait(15) == 0
