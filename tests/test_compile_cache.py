"""What a killed compiler leaves in the cache of compiled code."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.compile_cache import FOLDER, LINKING, is_unfinished, remove_unfinished
from training.compiling import CompilationStoppedError, Compiler
from training.distributed import World

LIBRARY = Path(next(Path(np.__file__).parent.rglob("*.so")))  # a real one


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a whole library and three that end early, all old."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    content = LIBRARY.read_bytes()
    for name, size in (("whole", len(content)), ("empty", 0), ("head", 30), ("half", len(content) // 2)):
        path = tmp_path / "ab" / f"{name}.so"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[:size])
        os.utime(path, (time.time() - 2 * LINKING,) * 2)
    return tmp_path / "ab"


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_libraries_that_end_early_are_removed(cache: Path) -> None:
    assert {path.stem for path in remove_unfinished()} == {"empty", "head", "half"}
    assert names(cache) == {"whole"}
    assert remove_unfinished() == []


def test_one_that_another_run_may_be_writing_stays(cache: Path) -> None:
    for path in cache.iterdir():
        os.utime(path)
    assert remove_unfinished() == []
    assert len(remove_unfinished(0)) == 3


def test_other_formats_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mach.so").write_bytes(b"\xcf\xfa\xed\xfe" + bytes(100))
    assert not is_unfinished(tmp_path / "mach.so")


def test_without_a_cache_of_our_own_nothing_is_touched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    assert remove_unfinished() == []
    assert len(names(cache)) == 4


def test_a_compile_begins_with_a_clean_cache_and_leaves_one_when_it_is_stopped(cache: Path) -> None:
    """As when Ctrl-C kills the linker."""
    compiler = Compiler(nn.Linear(2, 2), True, World(0, 1, torch.device("cpu")))
    begun: list[set[str]] = []

    def compile_until_stopped() -> None:
        with compiler.compiling():
            begun.append(names(cache))
            (cache / "killed.so").touch()
            compiler.stop.set()
            raise KeyboardInterrupt

    with pytest.raises(CompilationStoppedError):
        compile_until_stopped()
    assert begun == [{"whole"}]
    assert names(cache) == {"whole"}
