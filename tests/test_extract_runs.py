"""Nothing is lost, nothing is double: kills, full disks, sources that vanish, second runs, retries."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from extracting import features, files_of, small
from serving import HAT, PATIENCE, Around

from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import DataError, MixMIMError, OutputError
from mixmim_serve.extract import local, lock, shard
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.lock import locked
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.extract.progress import ExtractProgress, Meter

SHARD = 5  # images; the 24 photos make 5 shards


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that a test may alter."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def job(engine: Engine, source: Path, tmp_path: Path) -> ExtractJob:
    return small(engine, source, tmp_path / "out", images=SHARD)


@pytest.fixture
def undisturbed(engine: Engine, photos: Path, tmp_path: Path) -> dict[str, bytes]:
    """Every file of a run that nothing happened to."""
    return complete(small(engine, photos, tmp_path / "undisturbed", images=SHARD), engine)


def complete(job: ExtractJob, engine: Engine) -> dict[str, bytes]:
    """Run to the end; every file but the lock and the manifest, which names the source's place."""
    assert features(job, engine).complete
    found = files_of(Path(job.out))
    assert json.loads(found.pop("manifest.json"))["complete"]
    found.pop(".lock", None)
    return found


def keys(out: str | Path) -> list[str]:
    return [
        key
        for path in sorted(Path(out, "features").glob("*.parquet"))
        for key in pq.read_table(path)["key"].to_pylist()
    ]


def whole(out: Path) -> list[str]:
    """Shards that the manifest calls whole; each must be as it says."""
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    for each in shards:
        for name, about in each["files"].items():
            assert (out / name).stat().st_size == about["bytes"]
            assert pq.read_table(out / name).num_rows == each["rows"]
    return [each["name"] for each in shards]


# Killed


SLOW_RUN = """
import sys, time
from functools import partial
from pathlib import Path
sys.path[:0] = {path!r}
from extracting import features, small
from serving import Around
from mixmim_serve.engines import open_engine

engine = open_engine(Path({bundle!r}), "onnx", threads=1)
job = small(engine, {source!r}, {out!r}, images=5)
print("begun", flush=True)
features(job, Around(engine, lambda: time.sleep(0.05)), progress=lambda now: print(now.done, flush=True))
"""


def start(engine: Engine, source: Path, out: Path) -> subprocess.Popen[str]:
    """A run in a process of its own, slow enough to be killed in the middle; it tells how many images are done."""
    code = SLOW_RUN.format(
        path=[str(Path(__file__).parent)], bundle=str(engine.bundle.path), source=str(source), out=str(out)
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    engine: Engine, source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for images in (4, 12, 20):  # killed three times, each time a little later
        with start(engine, source, out) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdigit() and int(line) >= images:
                    process.kill()
                    break
            assert process.wait(PATIENCE) == -signal.SIGKILL
        (out / "features" / ".000004.parquet.left.tmp").write_bytes(b"half a shard")
    assert whole(out) != []
    assert complete(small(engine, source, out, images=SHARD), engine) == undisturbed
    assert len(set(keys(out))) == len(keys(out)) == 24


def test_ctrl_c_ends_it_after_a_batch_and_the_same_command_goes_on(exported_bundle: Path, tmp_path: Path) -> None:
    many, out = tmp_path / "many", tmp_path / "out"
    many.mkdir()
    (many / "0000.jpg").write_bytes(HAT)
    for number in range(1, 1200):
        os.link(many / "0000.jpg", many / f"{number:04}.jpg")
    code = "from mixmim_serve.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", str(exported_bundle), str(many), str(out), "--engine", "onnx"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not (out / ".lock").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[1].endswith("stopped before the end; the same command resumes\n")
    assert process.returncode == 130
    assert keys(out) == []  # it did not wait for its shard, of all images
    assert subprocess.run(command, check=False, timeout=PATIENCE, capture_output=True).returncode == 0
    assert len(set(keys(out))) == len(keys(out)) == 1200


def test_what_is_whole_is_not_done_again(job: ExtractJob, engine: Engine) -> None:
    complete(job, engine)
    assert complete(job, Around(engine, lambda: pytest.fail("nothing to do")))


@pytest.mark.parametrize("gone", ["features/000002.parquet", "shards/000002.json"])
def test_a_shard_that_lacks_a_file_is_done_again(
    job: ExtractJob, engine: Engine, undisturbed: dict[str, bytes], gone: str
) -> None:
    complete(job, engine)
    Path(job.out, gone).unlink()
    around = Around(engine, lambda: None)
    assert complete(job, around) == undisturbed
    assert len(around.ran) == 2  # five images in batches of four


def test_a_shard_that_was_cut_short_is_done_again(
    job: ExtractJob, engine: Engine, undisturbed: dict[str, bytes]
) -> None:
    complete(job, engine)
    path = Path(job.out, "features/000003.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    assert complete(job, engine) == undisturbed


def test_cancelled_it_stops_soon_and_goes_on_later(
    job: ExtractJob, engine: Engine, undisturbed: dict[str, bytes]
) -> None:
    seen: list[ExtractProgress] = []
    summary = features(job, engine, progress=seen.append, cancelled=lambda: len(seen) >= 3)
    assert not summary.complete
    assert 0 < summary.rows < 24
    assert len(seen) <= 4
    assert not json.loads(Path(job.out, "manifest.json").read_text())["complete"]
    assert complete(job, engine) == undisturbed


# Images that cannot be read


def spoil(source: Path, *names: str) -> None:
    for name in names:
        (source / name).write_bytes(HAT[:1000])


def test_errors_are_listed_and_retried_alone(
    job: ExtractJob, engine: Engine, photos: Path, source: Path, undisturbed: dict[str, bytes]
) -> None:
    # As long as they were, so that the source is the same
    sound = {name: (source / name).read_bytes() for name in ("03.jpg", "06.jpg", "07.jpg")}
    for name, data in sound.items():
        (source / name).write_bytes(data[:200] + bytes(len(data) - 200))
    summary = features(job, engine)
    assert (summary.rows, summary.errors, summary.complete) == (21, 3, True)
    errors = pq.read_table(Path(job.out) / "errors.parquet")
    assert errors["key"].to_pylist() == ["03.jpg", "06.jpg", "07.jpg"]
    assert all(reason.startswith("the JPEG image is ") for reason in errors["reason"].to_pylist())
    assert errors["shard"].to_pylist() == ["000000", "000001", "000001"]

    (source / "06.jpg").write_bytes(sound["06.jpg"])
    around = Around(engine, lambda: None)
    again = dataclasses.replace(job, retry_failed=True)
    summary = features(again, around)
    assert (summary.rows, summary.errors) == (22, 2)
    assert len(around.ran) == 1  # 03 cannot be read and needs no engine; 06 and 07 are one batch
    assert keys(job.out) == sorted(path.name for path in photos.iterdir() if path.name not in ("03.jpg", "07.jpg"))

    for name, data in sound.items():
        (source / name).write_bytes(data)
    assert complete(again, engine) == undisturbed  # as if all had been sound from the start


def test_retry_of_nothing_does_nothing(job: ExtractJob, engine: Engine) -> None:
    again = dataclasses.replace(job, retry_failed=True)
    assert not features(again, Around(engine, lambda: pytest.fail("nothing failed yet"))).complete
    complete(job, engine)
    assert complete(again, Around(engine, lambda: pytest.fail("nothing failed")))


def test_a_shard_of_errors_alone_is_whole(job: ExtractJob, engine: Engine, source: Path) -> None:
    for path in sorted(source.iterdir())[:SHARD]:
        path.write_bytes(b"no image")
    summary = features(job, engine)
    assert (summary.rows, summary.errors, summary.complete) == (19, 5, True)
    assert pq.read_table(Path(job.out) / "features" / "000000.parquet").num_rows == 0


def test_too_many_errors_stop_the_run(
    engine: Engine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "AT_ONCE", 1)
    spoil(source, *sorted(path.name for path in source.iterdir())[8:16])
    job = small(engine, source, tmp_path / "out", images=SHARD, max_failures=0.001)
    with pytest.raises(DataError, match=r"5 of 13 images could not be read, more than the share of 0\.001"):
        features(job, engine)
    assert whole(tmp_path / "out") == ["000000", "000001"]  # the third was under way
    at_last = small(engine, source, tmp_path / "out", images=SHARD, max_failures=0.05)
    with pytest.raises(DataError, match="8 of 24 images"):
        features(at_last, engine)
    assert len(whole(tmp_path / "out")) == 5
    assert features(small(engine, source, tmp_path / "out", images=SHARD, max_failures=0.1), engine).errors == 8


def test_the_share_of_failures_needs_some_images_to_say_much() -> None:
    meter = Meter(10_000, lambda now: None, lambda: False, 0.1)
    meter.count(100, [("a.jpg", "no image.")] * 100)
    with pytest.raises(DataError, match=r"101 of 200 .*; the last is b\.jpg: cut\.$"):
        meter.count(100, [("b.jpg", "cut.")])


# Sources that vanish


def test_a_folder_that_vanishes_is_told_from_bad_images(
    job: ExtractJob, engine: Engine, source: Path, undisturbed: dict[str, bytes]
) -> None:
    moved = source.with_name("moved")

    def vanish() -> None:
        if source.exists() and Path(job.out, "shards", "000000.json").exists():
            source.rename(moved)

    slow = Around(engine, lambda: (vanish(), time.sleep(0.05)))
    few = small(engine, source, job.out, images=SHARD, threads=1)
    with pytest.raises(DataError, match="no longer exists: restore it, and run again"):
        features(few, slow)
    assert 0 < len(whole(Path(job.out))) < 5
    assert pq.read_table(Path(job.out) / "errors.parquet").num_rows == 0
    moved.rename(source)
    assert complete(job, engine) == undisturbed


def test_a_tar_that_is_altered_meanwhile_is_told_from_bad_images(engine: Engine, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        for photo in sorted(source.iterdir()):
            tar.add(photo, photo.name)

    def cut() -> None:
        os.truncate(path, 20_000)

    job = small(engine, path, tmp_path / "out", images=SHARD, threads=1)
    with pytest.raises(DataError, match=r"photos\.tar was altered while it was being read"):
        features(job, Around(engine, cut))


def test_many_unreadable_images_in_a_row_are_no_accident(
    job: ExtractJob, engine: Engine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "UNREACHABLE", 8)
    monkeypatch.setattr(local, "AT_ONCE", 1)  # or the first two shards may change places
    for path in sorted(source.iterdir())[6:16]:
        path.unlink()
        path.symlink_to("nowhere.jpg")
    with pytest.raises(DataError, match=r"8 consecutive images of .* could not be read, the last because: cannot read"):
        features(job, engine)


# Another source, bundle, engine or set of options


def test_a_changed_source_is_refused(job: ExtractJob, engine: Engine, source: Path) -> None:
    before = complete(job, engine)
    spoil(source, "05.jpg")
    with pytest.raises(OutputError, match=r"has changed since .*out was started .*names or sizes differ"):
        features(job, engine)
    (source / "05.jpg").unlink()
    with pytest.raises(OutputError, match="then 24 images, now 23"):
        features(job, engine)
    assert {name: data for name, data in files_of(Path(job.out)).items() if name in before} == before


def test_other_options_are_refused(engine: Engine, source: Path, tmp_path: Path) -> None:
    features(small(engine, source, tmp_path / "out"), engine)
    other = small(engine, source, tmp_path / "out", options=ExtractOptions(dtype="float16"))
    with pytest.raises(OutputError, match=r"started with other options \(dtype float32\)"):
        features(other, engine)


REFUSAL = (
    r"of small \(model fingerprint (\w{8})\) on onnx-cpu in fp32 \(engine fingerprint \w{8}\), "
    r"not of small \(model fingerprint \1\) on torch-cpu in bf16"
)


def test_another_engine_or_bundle_is_refused(engine: Engine, bundle_copy: Path, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    features(small(engine, source, tmp_path / "out"), engine)
    half = open_engine(bundle_copy, "torch", "bf16", threads=1)
    with pytest.raises(OutputError, match=REFUSAL):
        features(small(half, source, tmp_path / "out"), half)


def test_a_damaged_manifest_is_refused(job: ExtractJob, engine: Engine) -> None:
    complete(job, engine)
    Path(job.out, "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="damaged or not a manifest"):
        features(job, engine)


# Two runs in one folder


def test_a_second_run_in_one_folder_is_refused(job: ExtractJob, engine: Engine, undisturbed: dict[str, bytes]) -> None:
    release, reached = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert release.wait(PATIENCE)

    first = threading.Thread(target=features, args=(job, Around(engine, hold)))
    first.start()
    assert reached.wait(PATIENCE)
    with pytest.raises(OutputError, match=r"another run is writing to .*out: wait for it, or choose another folder"):
        features(job, engine)
    release.set()
    first.join(PATIENCE)
    assert complete(job, engine) == undisturbed


@pytest.fixture
def bucket() -> Iterator[Folder]:
    fsspec.filesystem("memory").store.clear()
    yield Folder("memory://bucket/out")
    fsspec.filesystem("memory").store.clear()


def test_behind_a_url_a_lease_is_believed_for_a_while(bucket: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.6)
    refusal = r"another run .* seconds ago: wait for it or, if it was killed"
    with locked(bucket):
        time.sleep(1)  # it is renewed
        with pytest.raises(OutputError, match=refusal), locked(bucket):
            pass
    bucket.write_bytes(".lock", json.dumps({"host": "elsewhere", "pid": 1, "run": "x", "time": time.time()}).encode())
    with pytest.raises(OutputError, match=refusal), locked(bucket):
        pass
    time.sleep(0.7)
    with locked(bucket):
        pass


def test_a_lease_of_a_killed_process_of_this_machine_is_void(bucket: Folder) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    held = {"host": lock.socket.gethostname(), "pid": dead.pid, "run": "x", "time": time.time()}
    bucket.write_bytes(".lock", json.dumps(held).encode())
    with locked(bucket):
        pass


# A full disk

FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from extracting import features, small
from mixmim_serve.engines import open_engine
from mixmim_serve.errors import OutputError

engine = open_engine(Path({bundle!r}), "onnx", threads=1)
job = small(engine, {source!r}, {out!r}, images=5)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # no file may be longer: writes fail as on a full disk
try:
    features(job, engine)
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [3000, 1000])  # in the data of a shard; in the first manifest's successor
def test_a_full_disk_is_one_sentence(
    engine: Engine, source: Path, tmp_path: Path, undisturbed: dict[str, bytes], limit: int
) -> None:
    out = tmp_path / "out"
    code = FULL_DISK.format(
        path=[str(Path(__file__).parent)], bundle=str(engine.bundle.path), source=str(source), out=str(out), limit=limit
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE * 3)
    assert ended.returncode == 0, ended.stderr
    assert "cannot write" in ended.stdout
    assert (
        "File too large; all shards written so far are complete: run the same command again to resume." in ended.stdout
    )
    assert ended.stdout.count("\n") == 1
    assert list(out.rglob("*.tmp")) == []
    assert complete(small(engine, source, out, images=SHARD), engine) == undisturbed


def test_a_place_that_cannot_be_written_to_is_one_sentence(engine: Engine, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixMIMError, match="cannot write to"):
        features(small(engine, source, tmp_path / "file"), engine)


# ExtractProgress


def test_progress_counts_what_was_done_before(job: ExtractJob, engine: Engine) -> None:
    complete(job, engine)
    Path(job.out, "shards", "000001.json").unlink()
    seen: list[ExtractProgress] = []
    features(job, engine, progress=seen.append)
    assert [(now.done, now.total) for now in seen] == [(23, 24), (24, 24)]
    assert "images/s" in str(seen[-1])
    assert np.isfinite(seen[-1].rate)
    assert 0 <= seen[-1].waiting <= 1
