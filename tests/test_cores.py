"""Thread pools have as many threads as this process may use cores, whatever the host has."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from extracting import features as extract
from extracting import small

from mixmim_serve import cores
from mixmim_serve.cores import physical_cores, usable_cores
from mixmim_serve.engines import Engine
from mixmim_serve.explore import pages
from mixmim_serve.extract import pipeline, shard
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.service.settings import Settings
from mixmim_serve.sources import open_source
from training import check

Write = Callable[[str, str], None]
V2, V1 = "0::/\n", "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n0::/\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files of a machine with 64 CPUs, of which this process may use 8, that has no cgroups yet."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "_SIBLINGS", tmp_path / "siblings")

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    return write


def test_affinity_and_second_threads_count(write: Write) -> None:
    assert (usable_cores(), physical_cores()) == (8, 8)
    for siblings in ("0-1\n", "0,64\n"):
        write("siblings", siblings)
        assert (usable_cores(), physical_cores()) == (8, 4)
    write("siblings", "0\n")
    assert (usable_cores(), physical_cores()) == (8, 8)


def test_where_there_is_no_affinity_every_core_counts(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == 64


@pytest.mark.parametrize(("limit", "expected"), [("150000", 2), ("300000", 3), ("5000", 1), ("max", 8), ("999999", 8)])
def test_a_quota_of_cgroup_v2_is_rounded_up(write: Write, limit: str, expected: int) -> None:
    write("siblings", "0-1\n")
    write("own", V2)
    write("cgroup/cpu.max", f"{limit} 100000\n")
    assert (usable_cores(), physical_cores()) == (expected, min(expected, 4))


@pytest.mark.parametrize(("limit", "expected"), [("250000", 3), ("-1", 8)])
@pytest.mark.parametrize("folder", ["cpu/box", "cpu"])  # as the host sees it, and as a container sees itself
def test_a_quota_of_cgroup_v1_is_rounded_up(write: Write, folder: str, limit: str, expected: int) -> None:
    write("own", V1)
    write(f"cgroup/{folder}/cpu.cfs_quota_us", f"{limit}\n")
    write(f"cgroup/{folder}/cpu.cfs_period_us", "100000\n")
    assert usable_cores() == expected


def test_the_limit_of_an_outer_cgroup_holds_for_those_inside(write: Write) -> None:
    write("own", "0::/user.slice/session.scope\n")
    write("cgroup/user.slice/session.scope/cpu.max", "500000 100000\n")
    assert usable_cores() == 5
    write("cgroup/user.slice/cpu.max", "200000 100000\n")
    assert usable_cores() == 2


@pytest.mark.parametrize("own", ["", "nonsense\n", "0::/../../elsewhere\n"])
def test_what_cannot_be_read_limits_nothing(write: Write, own: str) -> None:
    write("own", own)
    write("cgroup/cpu.max", "nonsense\n")
    assert usable_cores() == 8


def test_every_pool_of_decoders_has_a_thread_per_usable_core(
    write: Write, engine: Engine, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("own", V2)
    write("cgroup/cpu.max", "300000 100000\n")
    pools: list[tuple[object, int]] = []
    for module in (pipeline, shard, pages, check):

        class Recording(ThreadPoolExecutor):
            def __init__(self, threads: int, thread_name_prefix: str = "", *, module: object = module) -> None:
                if thread_name_prefix in ("", "decode"):  # not the thread that runs the engine
                    pools.append((module, threads))
                super().__init__(threads, thread_name_prefix)

        monkeypatch.setattr(module, "ThreadPoolExecutor", Recording)

    assert Settings().decoders == 3
    extract(small(engine, photos, tmp_path / "out", threads=0), engine)
    shard.Worker(engine, open_source(photos), Folder(tmp_path / "other"), ExtractOptions()).close()
    assert len(list(pipeline.run_files(engine, sorted(photos.iterdir()), ["embedding"]))) == 24
    features = FeatureFolder(tmp_path / "out")
    pages.thumbnails(features, features.keys([0, 1]))
    check.check(open_source(photos))
    assert pools == [(shard, 3), (shard, 3), (pipeline, 3), (pages, 3), (check, 3)]
