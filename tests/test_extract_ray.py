"""Through Ray on this machine: a worker is killed in the middle, and the table is that of the local loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import pytest
from extracting import features, files_of, small

from mixmim_serve.engines import Engine
from mixmim_serve.errors import BundleError
from mixmim_serve.extract.lead import run
from mixmim_serve.extract.progress import ExtractProgress

pytestmark = pytest.mark.slow  # Ray takes ten seconds to start
pytest.importorskip("ray")


def kill_an_actor() -> bool:
    """With SIGKILL; False if none is there."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::Actor"):
            process.kill()
            return True
    return False


def test_a_killed_worker_changes_nothing(engine: Engine, spoilt: Path, tmp_path: Path) -> None:
    from mixmim_serve.extract.ray import RayExecutor

    expected = features(small(engine, spoilt, tmp_path / "local", images=2), engine)
    killed: list[bool] = []

    def kill_once(now: ExtractProgress) -> None:
        if not killed:
            killed.append(kill_an_actor())

    job = dataclasses.replace(small(engine, spoilt, tmp_path / "ray", images=2, actors=2), engine="onnx")
    found = run(job, executor=RayExecutor, progress=kill_once)
    assert killed == [True]
    assert (found.rows, found.errors, found.complete) == (expected.rows, expected.errors, True)
    local, ray = (files_of(tmp_path / name) for name in ("local", "ray"))
    assert local == ray


def test_errors_of_workers_are_one_sentence(engine: Engine, bundle_copy: Path, spoilt: Path, tmp_path: Path) -> None:
    from mixmim_serve.extract.ray import RayExecutor

    (bundle_copy / "encoder.onnx").unlink()
    job = dataclasses.replace(small(engine, spoilt, tmp_path / "out"), bundle=bundle_copy, engine="onnx")
    with pytest.raises(BundleError, match=r"^\S+ lacks encoder\.onnx: export the bundle again\.$"):
        run(job, executor=RayExecutor)
