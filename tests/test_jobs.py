"""Jobs over HTTP: what may be read, what comes of each, and that nothing that ends a server loses one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from extracting import files_of
from serving import HAT, TestClient, app_of, files, refusal
from test_server import STOP, Server, serve

from mixmim_serve.bundle import DEFAULT_BUNDLE, Bundle, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.lead import run
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.service.app import ENDPOINTS
from mixmim_serve.service.jobs import runner, worker
from mixmim_serve.service.jobs.options import parse_options
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.service.jobs.runner import JobRunner
from mixmim_serve.service.jobs.store import FORMAT, JobStore
from mixmim_serve.service.openapi.document import document
from mixmim_serve.service.request import Reservation
from mixmim_serve.service.settings import Settings
from mixmim_serve.sources import open_source

BAD = REPOSITORY / "tests" / "data" / "robustness" / "bad"
PATIENCE = 60  # seconds until a job that would hang fails its test
COPIES = 25  # of the 24 photos: a job that takes seconds, one image at a time
SLOWLY = {"batch": 1, "images": 50}
KEY = "a key of sixteen characters"


@pytest.fixture
def root(photos: Path, tmp_path: Path) -> Path:
    """A folder that jobs may read, with photos in it."""
    shutil.copytree(photos, tmp_path / "root" / "photos")
    return tmp_path / "root"


@pytest.fixture
def many(photos: Path, root: Path) -> str:
    """A source that takes seconds."""
    for copy in range(COPIES):
        shutil.copytree(photos, root / "many" / str(copy))
    return "many"


@dataclasses.dataclass
class Served:
    """A server with jobs, asked without a socket."""

    client: TestClient
    jobs: JobRunner

    def post(self, source: object, **options: object) -> Any:
        """A new job."""
        return self.client.post("/jobs", json={"source": source, "options": options})

    def begin(self, source: str, **options: object) -> str:
        """The id of a new job."""
        response = self.post(source, **options)
        assert response.status_code == 201, response.text
        assert response.headers["location"] == response.json()["url"]
        return str(response.json()["id"])

    def job(self, id_: str) -> dict[str, Any]:
        """A job as it is."""
        found: dict[str, Any] = self.client.get("/jobs", params={"id": id_}).json()
        return found

    def ended(self, id_: str) -> dict[str, Any]:
        """A job once it has ended."""
        return until(lambda: self.job(id_), lambda job: job["state"] in ("done", "failed", "cancelled"))

    def under_way(self, id_: str) -> psutil.Process:
        """The process of a job that has begun to run images."""
        until(lambda: self.job(id_), lambda job: job["progress"] is not None and job["progress"]["done"] > 0)
        return process_of(os.getpid())


def until(ask: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
    """Ask until the answer fits."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if fits(found := ask()):
                return found
        time.sleep(0.02)
    pytest.fail(f"waited {PATIENCE} s; at last {ask()}")


def process_of(server: int) -> psutil.Process:
    """The process that a server has do its job."""
    found = [each for each in psutil.Process(server).children() if worker.__name__ in each.cmdline()]
    (process,) = found
    return process


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; where nobody cares for orphans, it may still be listed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture
def start(engine: Engine, root: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts a server with jobs, again and again in the same folder."""
    with contextlib.ExitStack() as stack:

        def start(bundle: Bundle = engine.bundle, **settings: Any) -> Served:
            app = app_of(engine, **{"jobs_roots": (str(root),), "jobs_dir": str(tmp_path / "jobs")} | settings)
            app.state.jobs = JobRunner(app.state.settings, bundle, "onnx")
            app.state.jobs.start(app.state.metrics)
            stack.callback(app.state.runtime.close)
            stack.callback(app.state.jobs.close)
            return Served(TestClient(app), app.state.jobs)

        yield start


@pytest.fixture
def served(start: Callable[..., Served]) -> Served:
    return start()


@pytest.fixture
def undisturbed(exported_bundle: Path, root: Path, tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """The features that `mixmim extract` writes of a source, by the names of their files."""

    def undisturbed(source: str, **options: Any) -> dict[str, bytes]:
        out = tmp_path / "undisturbed"
        job = ExtractJob(exported_bundle, str(root / source), str(out), "onnx", options=ExtractOptions(**options))
        assert run(job, executor=functools.partial(LocalExecutor, engine=open_engine(exported_bundle, "onnx"))).complete
        return features_of(out)

    return undisturbed


@pytest.fixture(scope="module")
def features_of_many(exported_bundle: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The features that `mixmim extract` writes of `many` with the options SLOWLY, by the names of their files."""
    folder = tmp_path_factory.mktemp("many")
    for copy in range(COPIES):
        shutil.copytree(photos, folder / "many" / str(copy))
    job = ExtractJob(
        exported_bundle, str(folder / "many"), str(folder / "out"), "onnx", options=ExtractOptions(**SLOWLY)
    )
    assert run(job, executor=functools.partial(LocalExecutor, engine=open_engine(exported_bundle, "onnx"))).complete
    return features_of(folder / "out")


def conforms(schema: str, value: object) -> None:
    """Compare an answer with the OpenAPI document."""
    reference = {"$ref": f"#/components/schemas/{schema}", "components": document(ENDPOINTS)["components"]}
    pytest.importorskip("jsonschema_rs").validate(reference, value)


def features_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.startswith("features/")}


# What may be read.


@pytest.mark.parametrize(
    "source", ["photos", "photos/", ".", "photos/*.jpg", "list.txt", "{root}", "{root}/photos", "link/photos"]
)
def test_sources_below_a_root_are_found(root: Path, source: str) -> None:
    (root / "list.txt").write_text("photos/07.jpg\n")
    (root / "link").symlink_to(root)
    found, name = Roots([str(root)]).find(source.format(root=root))
    assert found == root
    assert (root / name.rstrip("/").replace("*", "07")).exists()


@pytest.mark.parametrize(
    "source",
    [
        "", "missing", "..", "photos/..", "../root", "{a,../secret}", "{root}/../secret", "/", "/etc", "out",
        "out/*.jpg", "*/a.jpg", "photos/*.tif", "s3://bucket/photos", "file:///etc", "file://{root}",
        "memory://else/x", "memory://mine/../x", "memory://mine/x::file:///etc", "pho\0tos", "photos\n", "x" * 5000,
    ],
)  # fmt: skip
def test_what_is_outside_or_missing_is_refused_alike(root: Path, source: str) -> None:
    secret = root.parent / "secret"
    secret.mkdir()
    (secret / "a.jpg").write_bytes(b"")
    (root / "out").symlink_to(secret)
    with pytest.raises(DataError, match=r"^unknown source .*: name a folder, file or pattern below the roots"):
        Roots([str(root), "memory://mine"]).find(source.replace("{root}", str(root)))


def test_the_first_root_that_has_it_is_read(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "more").mkdir(parents=True)
    (other / "photos").mkdir()
    roots = Roots([str(root), str(other), "memory://mine"])
    assert roots.find("photos") == (root, "photos")
    assert roots.find("more") == (other, "more")
    assert roots.find(str(other / "photos")) == (other, "photos")
    assert roots.find("memory://mine/x") == (None, "memory://mine/x")


def test_a_root_must_be_a_folder(root: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder: --jobs-root takes a folder"):
        Roots([str(root / "missing")])


@pytest.mark.parametrize("line", ["{secret}/a.jpg", "../secret/a.jpg", "out/a.jpg", "file://{secret}/a.jpg", "a.jpg"])
def test_a_list_or_link_to_something_else_is_refused(root: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = root.parent / "secret"
    secret.mkdir()
    shutil.copy(root / "photos" / "07.jpg", secret / "a.jpg")
    (root / "out").symlink_to(secret)
    (root / "a.jpg").symlink_to(secret / "a.jpg")
    (root / "list.txt").write_text(f"photos/07.jpg\n{line.format(secret=secret)}\n")
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match=r"^the source leads outside the roots of this server"):
        Roots([str(root)]).check(open_source("list.txt"), root)
    Roots([str(root)]).check(open_source("photos"), root)


def test_a_shard_behind_a_link_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarfile

    with tarfile.open(root.parent / "secret.tar", "w") as tar:
        tar.add(root / "photos" / "07.jpg", "hat.jpg")
    (root / "a.tar").symlink_to(root.parent / "secret.tar")
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match=r"^the source leads outside the roots of this server"):
        Roots([str(root)]).check(open_source("a.tar"), root)


# What can be asked for.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "options must be a JSON object."),
        ({"bach": 3}, "unknown option 'bach': choose one of features, .* Did you mean batch?"),
        ({"batch": "3"}, "batch must be a whole number from 1 to 256, got '3'."),
        ({"batch": True}, "batch must be a whole number from 1 to 256, got True."),
        ({"batch": 0}, "batch must be a whole number from 1 to 256, got 0."),
        ({"batch": 257}, "batch must be a whole number from 1 to 256, got 257."),
        ({"images": -1}, "images must be a whole number from 0 to 1,000,000, got -1."),
        ({"images": 10**7}, "images must be a whole number from 0 to 1,000,000, got 10000000."),
        ({"fast_jpeg": 1}, "fast_jpeg must be true or false, got 1."),
        ({"max_failures": 2}, "max_failures must be a number from 0 to 1, got 2."),
        ({"max_failures": "all"}, "max_failures must be a number from 0 to 1, got 'all'."),
        ({"format": "lance"}, "format must be one of parquet, npy, got 'lance'."),
        ({"format": "csv"}, "format must be one of parquet, npy, got 'csv'."),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, got 'int8'."),
        ({"features": "stage4"}, "features must be a list of names"),
        ({"features": ["stage5"]}, "this model has no features 'stage5'"),
        ({"features": ["stage4", "stage4"]}, "a feature is listed twice"),
    ],
)
def test_options_that_cannot_be(engine: Engine, options: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(options, engine.bundle)


def test_options_are_complete_and_equal_to_those_of_the_command(engine: Engine) -> None:
    assert parse_options({}, engine.bundle) == ExtractOptions(classes=True, head="main").to_dict() | {
        "max_failures": 0.1
    }
    assert parse_options({"classes": False}, engine.bundle)["classes"] is False
    assert parse_options({}, open_bundle(DEFAULT_BUNDLE))["classes"] is False
    given = {"features": ["stage4"], "dtype": "float16", "max_failures": 1}
    assert parse_options(given, engine.bundle)["features"] == ["stage4"]


def test_there_are_no_jobs_unless_the_operator_wants_them(client: TestClient) -> None:
    for method, path in (("POST", "/jobs"), ("GET", "/jobs"), ("DELETE", "/jobs?id=1"), ("GET", "/jobs/file?id=1"),
                         ("POST", "/jobs/cancel?id=1"), ("POST", "/jobs/resume?id=1")):  # fmt: skip
        status, message, _ = refusal(client.request(method, path, json={} if method == "POST" else None))
        assert (status, message[:24]) == (404, "this server takes no job")


def test_refusals(served: Served, root: Path) -> None:
    post = served.client.post
    assert refusal(served.post("/etc"))[::2] == (400, "source")
    assert refusal(served.post(None))[:2] == (
        400,
        "name a source: a folder, file or pattern below the roots of this server.",
    )
    assert refusal(served.post("photos", batch=0))[0] == 400
    assert refusal(post("/jobs", json={"source": "photos", "out": "elsewhere"}))[::2] == (400, "out")
    assert refusal(post("/jobs", json=["photos"]))[0] == 400
    assert refusal(post("/jobs", content=b"photos", headers={"content-type": "text/plain"}))[0] == 415
    assert refusal(post("/jobs?engine=torch", json={"source": "photos"}))[::2] == (400, "engine")
    for method, path in (("GET", "/jobs"), ("DELETE", "/jobs"), ("POST", "/jobs/cancel"), ("POST", "/jobs/resume"),
                         ("GET", "/jobs/file")):  # fmt: skip
        assert refusal(served.client.request(method, f"{path}?id=nobody"))[::2] == (404, "id")
    assert refusal(served.client.get("/jobs?state=lost"))[::2] == (400, "state")
    assert refusal(served.client.get("/jobs?limit=0"))[::2] == (400, "limit")


def test_jobs_need_no_place_for_an_image(start: Callable[..., Served]) -> None:
    served = start(max_waiting=1)
    with Reservation(served.client.app.state.admission, "somebody") as full:  # type: ignore[attr-defined]
        full.reserve(1)
        assert refusal(served.client.post("/embed", files=files(HAT)))[0] == 429
        response = served.post("photos")
        assert response.status_code == 201
        for path in ("/jobs/cancel", "/jobs/resume"):
            assert refusal(served.client.post(f"{path}?id=nobody"))[0] == 404
        assert served.client.post(f"/jobs/cancel?id={response.json()['id']}").status_code == 200


def test_a_key_is_asked_for(start: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    served = start(api_keys=str(tmp_path / "keys"))
    assert refusal(served.client.get("/jobs"))[0] == 401
    assert refusal(served.post("photos"))[0] == 401
    assert served.client.get("/jobs", headers={"x-api-key": KEY}).status_code == 200


# What comes of them.


def test_a_job_writes_what_the_command_writes(
    served: Served, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    shutil.copy(BAD / "gen__trunc_50_a.tif", served.jobs.roots.folders[0] / "photos" / "bad.tif")
    for name in ("clip.mov", "notes.txt", "more.txt"):
        (served.jobs.roots.folders[0] / "photos" / name).write_text("no image")
    id_ = served.begin("photos", features=["stage4"], images=10)
    job = served.ended(id_)
    conforms("Job", job)
    conforms("JobList", served.client.get("/jobs").json())
    assert (job["state"], job["error"], job["rows"]) == ("done", None, 24)
    assert job["progress"] | {"images_per_second": 0, "waiting": 0} == {
        "images": 25, "done": 25, "errors": 1, "images_per_second": 0, "waiting": 0, "seconds_left": 0,
        "passed_over": {".mov": 1, ".txt": 2},
    }  # fmt: skip
    assert job["created"] <= job["started"] <= job["ended"]
    found = {each["name"]: served.client.get(each["url"]).content for each in job["files"]}
    assert [len(found[each["name"]]) for each in job["files"] if each["name"].startswith("features/")] == [
        each["bytes"] for each in job["files"] if each["name"].startswith("features/")
    ]
    same = undisturbed("photos", features=("stage4",), images=10)
    assert {name: data for name, data in found.items() if name.startswith("features/")} == same
    (tmp_path / "errors.parquet").write_bytes(found["errors.parquet"])
    assert pq.read_table(tmp_path / "errors.parquet")["key"].to_pylist() == ["bad.tif"]
    assert str(tmp_path) not in str(found["manifest.json"])
    assert b'"name":"photos"' in found["manifest.json"]
    assert str(tmp_path).encode() not in found["errors.parquet"]


def test_files_by_other_names_are_not_given(served: Served, tmp_path: Path) -> None:
    id_ = served.begin("photos")
    served.ended(id_)
    for name in ("../jobs.sqlite", ".lock", "shards/000000.json", "features", "", "/etc/passwd"):
        status, _, param = refusal(served.client.get("/jobs/file", params={"id": id_, "name": name}))
        assert (status, param) == (404, "name")


def test_the_same_request_again_makes_no_second_job(served: Served, many: str) -> None:
    id_ = served.begin(many, **SLOWLY)
    again = served.post(many, **SLOWLY)
    conforms("Job", again.json())
    assert (again.status_code, again.json()["id"]) == (200, id_)
    assert served.begin(many, batch=2) != id_
    served.client.post(f"/jobs/cancel?id={id_}")
    served.ended(id_)
    assert served.begin(many, **SLOWLY) != id_


def test_one_job_at_a_time_the_oldest_first(served: Served, many: str) -> None:
    first = served.begin(many, **SLOWLY)
    served.under_way(first)
    second, third = served.begin("photos"), served.begin("photos", batch=8)
    assert [served.job(each)["state"] for each in (first, second, third)] == ["running", "queued", "queued"]
    assert (served.job(second)["ahead"], served.job(third)["ahead"]) == (1, 2)
    listed = served.client.get("/jobs").json()
    assert [each["id"] for each in listed["data"]] == [third, second, first]
    assert (listed["counts"]["queued"], listed["counts"]["running"]) == (2, 1)
    assert [each["id"] for each in served.client.get("/jobs?state=queued&limit=1").json()["data"]] == [third]
    assert 'mixmim_jobs{state="queued"} 2.0' in served.client.get("/metrics").text
    assert served.client.post(f"/jobs/cancel?id={third}").json()["state"] == "cancelled"
    served.client.post(f"/jobs/cancel?id={first}")
    assert [served.ended(each)["state"] for each in (first, second, third)] == ["cancelled", "done", "cancelled"]


def test_too_many_jobs_wait(start: Callable[..., Served], many: str) -> None:
    served = start(jobs_waiting=1)
    first = served.begin(many, **SLOWLY)
    served.under_way(first)
    served.begin("photos")
    response = served.post("photos", batch=2)
    assert (response.status_code, response.headers["retry-after"]) == (429, "60")
    assert refusal(response)[1] == "1 jobs are waiting already: try again when some have ended."


def test_cancelled_then_resumed_it_writes_the_same(
    served: Served, many: str, features_of_many: dict[str, bytes]
) -> None:
    id_ = served.begin(many, **SLOWLY)
    served.under_way(id_)
    assert refusal(served.client.post(f"/jobs/resume?id={id_}"))[0] == 409
    assert refusal(served.client.delete(f"/jobs?id={id_}"))[0] == 409
    assert served.client.post(f"/jobs/cancel?id={id_}").json()["state"] in ("cancelling", "cancelled")
    job = served.ended(id_)
    assert job["state"] == "cancelled"
    assert job["rows"] < 24 * COPIES
    assert served.client.post(f"/jobs/resume?id={id_}").json()["state"] in ("queued", "running")
    assert served.ended(id_)["rows"] == 24 * COPIES
    assert features_of(served.jobs.out(id_)) == features_of_many
    assert served.client.delete(f"/jobs?id={id_}").status_code == 204
    assert not served.jobs.out(id_).exists()
    assert refusal(served.client.get(f"/jobs?id={id_}"))[0] == 404


def test_too_many_failures_fail_it_and_nothing_of_the_machine_is_told(served: Served, root: Path) -> None:
    shutil.copytree(BAD, root / "bad")
    job = served.ended(served.begin("bad"))
    assert job["state"] == "failed"
    assert "images could not be read, more than the share of 0.1 that max_failures allows" in job["error"]
    assert str(root.parent) not in str(job)


def test_what_could_not_be_read_is_tried_again(served: Served, root: Path) -> None:
    photo = root / "photos" / "07.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(b"\0" * len(whole))  # the size that is right, of a disk that was not
    id_ = served.begin("photos")
    assert served.ended(id_)["progress"]["errors"] == 1
    photo.write_bytes(whole)
    served.client.post(f"/jobs/resume?id={id_}&retry_failed=true")
    job = served.ended(id_)
    assert (job["state"], job["progress"]["errors"], job["rows"]) == ("done", 0, 24)


def test_a_source_that_went_away(served: Served, root: Path) -> None:
    id_ = served.begin("photos")
    assert served.ended(id_)["state"] == "done"
    shutil.rmtree(root / "photos")
    assert refusal(served.client.post(f"/jobs/resume?id={id_}"))[::2] == (400, "source")


def test_results_that_cannot_be_written_fail_it_in_one_sentence(served: Served, root: Path) -> None:
    id_ = served.begin("photos")
    served.ended(id_)
    shutil.rmtree(served.jobs.out(id_))
    served.jobs.out(id_).write_text("in the way")
    served.client.post(f"/jobs/resume?id={id_}")
    job = served.ended(id_)
    assert (job["state"], job["error"]) == ("failed", "cannot write to the folder of results: File exists.")


def test_a_process_that_dies_fails_its_job_alone(served: Served, many: str, features_of_many: dict[str, bytes]) -> None:
    id_ = served.begin(many, **SLOWLY)
    served.under_way(id_).kill()
    job = served.ended(id_)
    assert job["error"].startswith("its process ended with signal 9: complete shards are kept, resume the job")
    assert served.ended(served.begin("photos"))["state"] == "done"
    served.client.post(f"/jobs/resume?id={id_}")
    assert served.ended(id_)["state"] == "done"
    assert features_of(served.jobs.out(id_)) == features_of_many


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux")
def test_it_has_the_least_priority_in_the_session_of_the_server(served: Served, many: str) -> None:
    process = served.under_way(served.begin(many, **SLOWLY))
    threads = [each.id for each in process.threads()]
    assert {os.sched_getscheduler(each) for each in threads} == {os.SCHED_IDLE}
    assert os.getsid(process.pid) == os.getsid(0)
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_photos_in_a_root_cannot_become_code(served: Served, root: Path) -> None:
    (root / "numpy.py").write_text("raise SystemExit('imported from the root')")
    (root / "PIL.py").write_text("raise SystemExit('imported from the root')")
    assert served.ended(served.begin("photos"))["state"] == "done"


def test_a_list_that_cannot_be_written_for_a_while(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    end, failed = served.jobs.store.end, []

    def full(*values: Any, **named: Any) -> None:
        if len(failed) < 2:
            failed.append(values)
            raise sqlite3.OperationalError("database or disk is full")
        end(*values, **named)

    monkeypatch.setattr(served.jobs.store, "end", full)
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.05)
    assert served.ended(served.begin("photos"))["state"] == "done"
    assert len(failed) == 2


def test_a_process_that_cannot_be_started(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    job = served.ended(served.begin("photos"))
    assert (job["state"], job["error"]) == ("failed", "the server failed on this job; its log has the reason.")
    monkeypatch.undo()
    served.client.post(f"/jobs/resume?id={job['id']}")
    assert served.ended(job["id"])["state"] == "done"


# What ends a server.


def test_a_server_that_is_closed_goes_on_with_its_job_when_it_is_back(
    start: Callable[..., Served], many: str, features_of_many: dict[str, bytes]
) -> None:
    served = start()
    id_ = served.begin(many, **SLOWLY)
    process = served.under_way(id_)
    served.jobs.close()
    assert has_ended(process)
    back = start()
    assert back.ended(id_)["state"] == "done"
    assert features_of(back.jobs.out(id_)) == features_of_many


def test_a_server_with_another_model_does_not_go_on_with_it(start: Callable[..., Served], many: str) -> None:
    served = start()
    id_ = served.begin(many, **SLOWLY)
    served.under_way(id_)
    served.jobs.close()
    back = start(bundle=open_bundle(DEFAULT_BUNDLE))
    assert back.ended(id_)["error"].startswith("the folder of results has features of small (model fingerprint ")
    assert back.ended(id_)["state"] == "failed"


@pytest.mark.parametrize(
    ("by", "to_all"),
    [
        (signal.SIGKILL, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow),
    ],
)
def test_a_job_survives_the_end_of_its_server(
    exported_bundle: Path, root: Path, many: str, tmp_path: Path, by: signal.Signals, to_all: bool,
    features_of_many: dict[str, bytes],
) -> None:  # fmt: skip
    setting = f"jobs_dir={tmp_path / 'jobs'}"

    def job(server: Server) -> Any:
        import orjson

        return orjson.loads(server.ask("GET", "/jobs")[1])["data"][0]

    with serve(exported_bundle, tmp_path, setting, jobs_root=root) as server:
        server.wait_until_ready()
        body = f'{{"source": "{many}", "options": {{"batch": 1, "images": 50}}}}'.encode()
        assert ask_json(server, body) == 201
        until(lambda: job(server), lambda job: job["progress"] and job["progress"]["done"] > 60)
        process = process_of(server.process.pid)
        if to_all and by == signal.SIGTERM:  # as systemd does, in no certain order
            process.send_signal(by)
            time.sleep(0.5)
        server.process.send_signal(by)
        if to_all and by == signal.SIGKILL:
            process.kill()
        assert server.wait(STOP) == (0 if by == signal.SIGTERM else -by)
    with serve(exported_bundle, tmp_path, setting, jobs_root=root) as server:
        server.wait_until_ready()
        done = until(lambda: job(server), lambda job: job["state"] not in ("queued", "running"))
        assert (done["state"], done["error"]) == ("done", None)
        assert done["progress"]["done"] == 24 * COPIES
        out = tmp_path / "jobs" / done["id"]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(STOP) == 0
    assert has_ended(process)
    assert features_of(out) == features_of_many


def ask_json(server: Server, body: bytes) -> int:
    import http.client

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("POST", "/jobs", body, {"content-type": "application/json"})
        return connection.getresponse().status


def test_another_server_may_not_do_the_same_jobs(start: Callable[..., Served]) -> None:
    start()
    with pytest.raises(ConfigError, match=r"another server uses the jobs folder .*: choose another with --set"):
        start()


def test_a_folder_that_cannot_be_written_to(engine: Engine, root: Path) -> None:
    (root / "file").write_text("")
    settings = Settings(jobs_roots=(str(root),), jobs_dir=str(root / "file"))
    with pytest.raises(ConfigError, match=r"cannot write to .*file: File exists."):
        JobRunner(settings, engine.bundle, "onnx")


def test_results_lie_outside_of_bentoml(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmim_serve.service.jobs.runner import jobs_folder

    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert jobs_folder(Settings()) == Path("/data/mixmim-serve/jobs")


# The list.


def test_what_ran_is_queued_again_and_what_was_being_cancelled_is(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(path)
    ids = []
    for number in range(3):
        added = store.add("photos", {"batch": number}, 10)
        assert added is not None
        ids.append(added[0].id)
    assert [store.start_next().id, store.start_next().id] == ids[:2]  # type: ignore[union-attr]
    store.cancel(ids[1])
    again = JobStore(path)  # the first one was killed, and closed nothing
    again.recover()
    assert [each.state for each in again.newest(("queued", "cancelled"), 10)] == ["queued", "cancelled", "queued"]
    for opened in (again, store):
        opened.close()


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")

    def half_done() -> None:
        with store._change() as change:
            change("INSERT INTO jobs (id, source, options, state, created) VALUES ('1', 'photos', '{}', 'queued', 0)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_done()
    assert store.newest(("queued",), 10) == []
    store.close()


def test_a_list_of_a_later_version_or_of_something_else_is_refused(tmp_path: Path) -> None:
    later = JobStore(tmp_path / "jobs.sqlite")
    later._sqlite.execute(f"PRAGMA user_version={FORMAT + 1}")
    later.close()
    with pytest.raises(ConfigError, match="was written by a later version of this server"):
        JobStore(tmp_path / "jobs.sqlite")
    (tmp_path / "other").write_bytes(b"no database at all, but a text that is long enough to be read")
    with pytest.raises(ConfigError, match="cannot open the list of jobs"):
        JobStore(tmp_path / "other")


def test_the_command_says_what_jobs_may_read(exported_bundle: Path, root: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, f"jobs_dir={tmp_path / 'jobs'}", jobs_root=root) as server:
        server.wait_until_ready()
        assert f"jobs may read below {root} and write to {tmp_path / 'jobs'}" in server.log.read_text()


def test_paths_in_messages() -> None:
    task = {"out": "/a/jobs/1", "bundle": "/a/bundle", "roots": ["/a/root", "/a/root/deep", "s3://bucket/"]}
    said = "cannot read /a/root/deep/x.jpg or /a/root/y.jpg, cannot write /a/jobs/1/z, /a/bundle was altered, s3://bucket/x"
    assert worker.without_paths(said, task) == (
        "cannot read x.jpg or y.jpg, cannot write the folder of results/z, the bundle was altered, s3://bucket/x"
    )
    assert sys.executable not in worker.without_paths(said, task)
