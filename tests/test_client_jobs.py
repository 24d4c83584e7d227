"""Jobs from Python: sync and async, waiting, results in a folder of the client's."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from extracting import files_of
from serving import PATIENCE, url_of

from mixmim_serve.client import AsyncClient, Client, Job, Policy
from mixmim_serve.client import jobs as module
from mixmim_serve.engines import Engine
from mixmim_serve.errors import RefusedError, ServerError
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.service.jobs.runner import JobRunner

QUICK = Policy(first_wait=0.01, longest_wait=0.05, total=PATIENCE)


@pytest.fixture(scope="module")
def jobs_url(engine: Engine, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("jobs")
    shutil.copytree(photos, folder / "root" / "photos")
    with url_of(engine, jobs_roots=(str(folder / "root"),), jobs_dir=str(folder / "jobs")) as (url, app):
        app.state.jobs = JobRunner(app.state.settings, engine.bundle, "onnx")
        app.state.jobs.start(app.state.metrics)
        yield url
        app.state.jobs.close()


@pytest.fixture
def client(jobs_url: str) -> Iterator[Client]:
    with Client(jobs_url, policy=QUICK) as client:
        yield client


def test_from_start_to_results(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)
    heard: list[Job] = []
    begun = client.jobs.start("photos", images=10, features=["stage4"])
    assert (begun.source, begun.files, begun.about["options"]["images"]) == ("photos", (), 10)
    assert client.jobs.start("photos", images=10, features=["stage4"]).id in (begun.id, client.jobs.list()[0].id)
    done = client.jobs.wait(begun.id, every=0.05, progress=heard.append)
    assert (done.state, done.error, done.ended, heard[-1]) == ("done", None, True, done)
    assert done.progress is not None
    assert done.progress["done"] == 24
    folder = client.jobs.download(begun.id, tmp_path / "got")
    assert {name: len(data) for name, data in files_of(folder).items() if "/" in name} == {
        file.name: file.size for file in done.files if "/" in file.name
    }
    assert max(file.size for file in done.files) > 3000  # several pieces
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    assert len(FeatureFolder(folder)) == 24
    assert [each.vectors.shape for each in FeatureFolder(folder).blocks()] == [(8, 64)] * 3


def test_a_download_goes_on_where_it_was(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.jobs.wait(client.jobs.start("photos", images=10, batch=8).id, every=0.05)
    folder = client.jobs.download(job.id, tmp_path / "got")
    before = files_of(folder)
    (folder / "features" / "000001.parquet").unlink()
    asked: list[str] = []
    pieces = module._Pieces

    def noted(job: str, name: str) -> Any:
        asked.append(name)
        return pieces(job, name)

    monkeypatch.setattr(module, "_Pieces", noted)
    assert files_of(client.jobs.download(job.id, folder)) == before
    assert asked == ["features/000001.parquet", "manifest.json", "errors.parquet"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "c:x", "a\\x"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ServerError, match="which is none that could be written here"):
        module._inside(name)


def test_cancel_resume_list_delete(client: Client) -> None:
    job = client.jobs.start("photos", batch=1, images=5)
    assert client.jobs.cancel(job.id).state in ("cancelling", "cancelled", "done")
    ended = client.jobs.wait(job.id, every=0.05)
    assert ended.id in [each.id for each in client.jobs.list([ended.state])]
    assert client.jobs.list(["queued"]) == ()
    client.jobs.resume(job.id, retry_failed=True)
    assert client.jobs.wait(job.id, every=0.05).state == "done"
    client.jobs.delete(job.id)
    with pytest.raises(RefusedError, match="404: unknown job"):
        client.jobs.get(job.id)


def test_what_is_refused(client: Client) -> None:
    with pytest.raises(RefusedError, match="400: unknown source 'elsewhere'"):
        client.jobs.start("elsewhere")
    with pytest.raises(RefusedError, match=r"Did you mean batch\?"):
        client.jobs.start("photos", bach=3)


def test_the_async_client_does_the_same(jobs_url: str, client: Client, tmp_path: Path) -> None:
    async def all_of_it() -> Job:
        async with AsyncClient(jobs_url, policy=QUICK) as ours:
            job = await ours.jobs.start("photos", batch=4)
            await ours.jobs.cancel(job.id)
            await ours.jobs.wait(job.id, every=0.05)
            await ours.jobs.resume(job.id)
            done = await ours.jobs.wait(job.id, every=0.05)
            await ours.jobs.download(job.id, tmp_path / "async")
            assert done == await ours.jobs.get(job.id)
            assert job.id in [each.id for each in await ours.jobs.list(["done"])]
            client.jobs.download(job.id, tmp_path / "sync")
            await ours.jobs.delete(job.id)
            return done

    assert asyncio.run(all_of_it()).state == "done"
    assert files_of(tmp_path / "async") == files_of(tmp_path / "sync")


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found: dict[str, Callable[..., Any]] = {
            name: each for name, each in vars(kind).items() if not name.startswith("_")
        }
        return {name: list(inspect.signature(each).parameters) for name, each in found.items()}

    assert methods(module.Jobs) == methods(module.AsyncJobs)
    assert len(methods(module.Jobs)) == 8


def test_a_server_without_jobs(engine: Engine) -> None:
    with url_of(engine) as (url, _), Client(url, policy=QUICK) as client, pytest.raises(RefusedError, match="no jobs"):
        client.jobs.list()
