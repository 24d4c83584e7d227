"""Attacks through the source of a job: it reads what is not the client's, or holds up the server."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import http.server
import os
import signal
import sqlite3
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_jobs
from serving import HAT, files, refusal
from test_jobs import Served, ask_json
from test_server import STOP, serve

from mixmim_serve.errors import ConfigError, DataError, ImageError, OutsideError
from mixmim_serve.service.jobs.roots import Roots
from mixmim_serve.sources import local, open_source, storage
from mixmim_serve.sources.confinement import HAS_HANDLES, Confinement
from mixmim_serve.sources.patterns import SearchLimit

root, start, served = test_jobs.root, test_jobs.start, test_jobs.served

PRIVATE = "the first line of a file that is not the client's"
TOO_MANY = [
    "{0..999}{0..999}{0..999}*",
    "{0..20000000}.jpg",
    "{00000000..99999999}.jpg",
    "{0..99999999999999999999}.jpg",
    "{a{0..999},b}{0..999}{0..999}",
    "{a,b}" * 40,
    "{a,{b,c}}" * 30,
    "{,}" * 1000,
]


@pytest.fixture
def secret(root: Path) -> Path:
    """A folder beside the root, with a photo, a text and shards that no job may read."""
    folder = root.parent / "secret"
    folder.mkdir()
    photo = (root / "photos" / "07.jpg").read_bytes()
    (folder / "holiday.jpg").write_bytes(photo)
    (folder / "passwords.txt").write_text(f"{PRIVATE}\n{PRIVATE}\n")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "holiday.jpg", "holiday.jpg")
    return folder


@contextlib.contextmanager
def web(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def say_secret(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(PRIVATE)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(PRIVATE.encode())


# Patterns that mean too much.


@pytest.mark.parametrize("pattern", TOO_MANY)
def test_braces_are_counted_before_they_are_written_out(root: Path, pattern: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    for find in (storage.expand, open_source, Roots([str(root)]).find):
        with pytest.raises(DataError, match=r"means more than 10{1,2},000 names: use \* or a folder instead\.$"):
            find(pattern)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert time.process_time() - began < 10


def test_a_pattern_of_many_stars_walks_the_tree_once(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"a" * 40)
    deep.mkdir(parents=True)
    (deep / "x.jpg").touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    began = time.process_time()
    assert storage.expand(f"{tmp_path}/" + "**/a/" * 12 + "**/x.jpg")
    with pytest.raises(DataError, match="no file matches"):
        storage.expand(f"{tmp_path}/" + "**/*/" * 20 + "**/nothing")
    assert time.process_time() - began < 5


def test_a_search_ends_at_its_deadline_and_when_it_is_stopped(root: Path) -> None:
    roots = Roots([str(root)])
    slow = "photos/{0..9999}x*"
    with pytest.raises(DataError, match=r"took longer than 0\.01 s: name a folder"):
        roots.find(slow, SearchLimit(0.01, 10_000))
    with pytest.raises(DataError, match="was stopped"):
        roots.find(slow, SearchLimit(100, 10_000, stopped=lambda: True))


def test_searches_hold_up_nobody_and_no_end(exported_bundle: Path, root: Path, tmp_path: Path) -> None:
    (root / "full").mkdir()
    for number in range(3000):
        (root / "full" / f"{number}.txt").touch()
    with serve(exported_bundle, tmp_path, f"jobs_dir={tmp_path / 'jobs'}", jobs_root=root) as server:
        server.wait_until_ready()
        body = b'{"source": "full/{0..9999}x*"}'

        def submit(_: int) -> int | None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return ask_json(server, body)
            return None

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            submitted = [pool.submit(submit, number) for number in range(40)]
            time.sleep(0.5)
            began = time.monotonic()
            for _ in range(20):
                assert server.ask("POST", "/embed", HAT)[0] == 200
            assert server.ask("GET", "/readyz")[0] == 200
            assert server.ask("GET", "/jobs")[0] == 200
            assert time.monotonic() - began < 8
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.wait(STOP) == 0
            assert time.monotonic() - began < 4
            statuses = {future.result() for future in submitted}
        assert statuses <= {400, 429, 503, None}
        assert 429 in statuses  # the queue is short
        assert "Traceback" not in server.log.read_text()


def test_a_client_that_leaves_ends_its_search(served: Served, root: Path) -> None:
    import asyncio

    from mixmim_serve.service.routes.jobs import _search

    ended = threading.Event()

    def search(limit: SearchLimit) -> None:
        try:
            while True:
                limit.check()
                time.sleep(0.01)
        finally:
            ended.set()

    async def leave() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_search(served.jobs, search), 0.1)

    asyncio.run(leave())
    assert ended.wait(2)


# Sources that lead outside.


@pytest.mark.parametrize(
    "source",
    [
        "{photos/07.jpg,{secret}/holiday.jpg}",
        "{{secret}/passwords.txt,x}",
        "{{root}/photos/07.jpg,{secret}/holiday.jpg}",
        "{photos/*,{secret}/*}",
        "{photos/*.jpg,{secret}/**/*.jpg}",
        "{x,}{secret}/passwords.txt",
        "{photos,/dev/zero}",
        "{photos/07.jpg,{url}/list.txt}",
        "{{url}/list.txt,x}",
        "{x,{url}/}list.txt",
        "{photos/07.jpg,memory://else/x}",
        "memory://{mine,else}/x",
        "{memory://mine/x,memory://mine/%2e%2e/else/x}",
        "memory://mine/%2e%2e/else",
        "memory://mine/%252e%252e/else",
        "memory://mine/..\\else",
        "out/{holiday,x}.jpg",
        "{out,photos}/*.jpg",
        "linked.tar",
        "{linked,x}.tar",
        "chain/holiday.jpg",
        "up/secret/holiday.jpg",
    ],
)
def test_every_place_that_braces_mean_is_checked(served: Served, root: Path, secret: Path, source: str) -> None:
    (root / "out").symlink_to(secret)
    (root / "linked.tar").symlink_to(secret / "shard.tar")
    (root / "chain").symlink_to("out")
    (root / "up").symlink_to("..")
    with web(say_secret) as (url, asked):
        for name, value in (("{secret}", secret), ("{root}", root), ("{url}", url)):
            source = source.replace(name, str(value))
        response = served.post(source)
        assert refusal(response)[::2] == (400, "source")
        assert refusal(response)[1].startswith(f"unknown source {source[:200]!r}: name a folder")
        assert asked == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "photos/07.jpg\n{secret}/passwords.txt\n"),
        ("list.txt", "photos/07.jpg\n{secret}/missing.txt\n"),
        ("list.csv", "path,label\nfile://{secret}/holiday.jpg,cat\n"),
        ("list.tsv", "out/holiday.jpg\tcat\n"),
        ("list.txt", "../secret/holiday.jpg\n"),
        ("list.txt", "{url}/inside.jpg\n"),
        ("list.txt", "local://{secret}/holiday.jpg\n"),
        ("list.txt", "photos/../../secret/holiday.jpg\n"),
    ],
)
def test_lists_lead_nowhere_and_errors_name_nothing(
    served: Served, root: Path, secret: Path, name: str, content: str
) -> None:
    (root / "out").symlink_to(secret)
    with web(say_secret) as (url, asked):
        (root / name).write_text(content.replace("{secret}", str(secret)).replace("{url}", url))
        job = served.ended(served.begin(name))
        assert asked == []
    assert job["state"] == "failed"
    for word in (PRIVATE, "holiday", "passwords", "missing", str(secret), url):
        assert word not in str(job)


@pytest.mark.parametrize("name", ["a.tar", "a.txt", "a.parquet"])
def test_a_link_is_refused_before_what_it_leads_to_is_opened(root: Path, secret: Path, name: str) -> None:
    os.mkfifo(secret / name)  # opening it would block
    (root / name).symlink_to(secret / name)
    roots = Roots([str(root)])
    with pytest.raises(DataError, match="unknown source"):
        roots.find(name)
    with local.confined(roots.confinement.at(root)), pytest.raises(DataError, match="no such file"):
        open_source(name)


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "whole").symlink_to(root)
    (root / "relative").symlink_to("photos/../photos")
    (root / "twice").symlink_to("whole/relative")
    roots = Roots([str(root)])
    with local.confined(roots.confinement.at(root)):
        for source in ("whole/photos", "relative", "twice", f"{root}/twice", "twice/*.jpg", "photos/../photos"):
            opened = open_source(source)
            roots.check(opened, root)
            assert len(opened.read(0)) > 100


def test_a_link_into_another_root_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photos").symlink_to("../root/photos")
    roots = Roots([str(tmp_path / "other"), str(root)])
    assert roots.find("photos") == (tmp_path / "other", "photos")
    with local.confined(roots.confinement.at(tmp_path / "other")):
        assert len(open_source("photos").keys) == 24


@pytest.mark.parametrize("kind", ["loop", "deep"])
def test_links_in_circles_end(root: Path, kind: str) -> None:
    if kind == "loop":
        (root / "loop").symlink_to("loop")
    else:
        for number in range(50):
            (root / f"{number}").symlink_to(f"{number + 1}")
    confinement = Roots([str(root)]).confinement.at(root)
    with pytest.raises(OSError, match="symbolic links"):
        confinement.stat("loop/a.jpg" if kind == "loop" else "0")


@pytest.mark.skipif(not HAS_HANDLES, reason="no handles of folders")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_is_swapped_all_the_time_never_leads_outside(root: Path, secret: Path, what: str) -> None:
    (root / "inside").mkdir()
    (root / "inside" / "holiday.jpg").write_bytes(b"inside")
    place, inside, outside = {
        "file": ("x", "inside/holiday.jpg", str(secret / "holiday.jpg")),
        "folder": ("x/holiday.jpg", "inside", str(secret)),
    }[what]
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in (inside, outside):
                os.symlink(target, root / "new")
                os.replace(root / "new", root / "x")

    thread = threading.Thread(target=swap)
    thread.start()
    results = {b"": 0, b"inside": 0}
    confinement = Confinement([root], [], root)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            with confinement.open(place) as file:
                results[file.read()] += 1  # KeyError for anything else
        except (OSError, OutsideError):
            results[b""] += 1
    stop.set()
    thread.join()
    assert all(results.values())


def test_a_job_is_confined_as_long_as_it_runs(root: Path, secret: Path) -> None:
    """A photo of a folder that becomes a link after the source was checked."""
    roots = Roots([str(root)])
    with local.confined(roots.confinement.at(root)):
        source = open_source("photos")
        roots.check(source, root)
        (root / "photos").rename(root / "old")
        (root / "photos").symlink_to(secret)
        (secret / "00.jpg").write_text(PRIVATE)
        with pytest.raises(OutsideError):
            source.read(0)


def test_redirects_lead_nowhere() -> None:
    with web(say_secret) as (inside, asked):

        def redirect(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{inside}/{PRIVATE[:3]}.jpg")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        with web(redirect) as (url, _), local.confined(Confinement([], [f"{url}/"])):
            with pytest.raises((DataError, ImageError)) as caught:
                storage.read_image(f"{url}/a.jpg")
            assert PRIVATE not in str(caught.value)
            with pytest.raises(DataError):
                open_source(f"{url}/a.tar")
        assert asked == []


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.txt", "a.jpg"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    (tmp_path / "z").mkdir()
    for access in (None, Confinement([tmp_path, Path("/dev")], [], tmp_path)):
        with local.confined(access) if access else contextlib.nullcontext():
            if name == "a.jpg":
                source = open_source(tmp_path)
                with pytest.raises(ImageError, match="it is not a regular file"):
                    source.read(0)
            else:
                with pytest.raises(DataError, match="it is not a regular file"):
                    open_source(tmp_path / name)


# The folder of jobs.


def test_two_servers_on_one_folder_by_two_names(start: Callable[..., Served], tmp_path: Path) -> None:
    start()
    (tmp_path / "same").symlink_to(tmp_path / "jobs")
    for folder in (tmp_path / "jobs", tmp_path / "same", tmp_path / "jobs" / ".." / "jobs"):
        with pytest.raises(ConfigError, match="another server uses the jobs folder"):
            start(jobs_dir=str(folder))


def test_a_full_disk_is_507_with_a_sentence(served: Served) -> None:
    sqlite = served.jobs.store._sqlite
    (pages,) = sqlite.execute("PRAGMA page_count").fetchone()
    sqlite.execute(f"PRAGMA max_page_count={pages}")
    for number in range(300):
        response = served.post("photos", batch=number % 256 + 1, images=number)
        if response.status_code != 201:
            break
    assert refusal(response)[0] == 507
    assert "no space left" in refusal(response)[1]
    sqlite.execute("PRAGMA max_page_count=1000000")
    assert served.post("photos", images=999).status_code == 201


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (sqlite3.OperationalError("database or disk is full"), 507),
        (OSError(28, "No space left on device"), 507),
        (sqlite3.OperationalError("disk I/O error"), 503),
        (sqlite3.OperationalError("database is locked"), 503),
        (sqlite3.DatabaseError("database disk image is malformed"), 503),
    ],
)
def test_failures_of_the_list(served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    def fail(*_: Any) -> None:
        raise error

    for name in ("add", "get", "newest"):
        monkeypatch.setattr(served.jobs.store, name, fail)
    for response in (served.post("photos"), served.client.get("/jobs"), served.client.get("/jobs?id=1")):
        assert refusal(response)[0] == status
        assert str(error) not in response.text
    assert served.client.post("/embed", files=files(HAT)).status_code == 200
