"""What goes wrong around a server, and what is lost by it: nothing, with our client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import HAT, PATIENCE, PHOTOS, Around, Gate, files, url_of
from test_server import STOP, Server, post, serve

from mixmim_serve.client import Client, Embedding, Policy
from mixmim_serve.engines import Engine
from mixmim_serve.extract.pipeline import run_files

IMAGES = [path.read_bytes() for path in PHOTOS.values()]


class Load:
    """Clients of ours, single calls and `embed_many` side by side, until they are told to stop."""

    def __init__(self, url: str, vectors: list[Any]) -> None:
        self.url, self.vectors = url, vectors
        self.enough = threading.Event()
        self.lock = threading.Lock()
        self.sent = self.right = self.wrong = self.broken = 0  # images; and tries that failed
        self.policy = Policy(retries=None, total=120, first_wait=0.05, longest_wait=0.5)

    def images(self) -> Iterator[bytes]:
        for image in itertools.cycle(IMAGES):
            if self.enough.is_set():
                return
            with self.lock:
                self.sent += 1
            yield image

    def many(self) -> None:
        with self.client() as client:
            found = client.embed_many(self.images(), per_request=8, in_flight=3)
            for result, expected in zip(found, itertools.cycle(self.vectors), strict=False):
                self.count(result, expected)

    def single(self) -> None:
        with self.client() as client:
            for image, expected in zip(self.images(), itertools.cycle(self.vectors), strict=False):
                self.count(client.embed(image), expected)

    def count(self, result: Any, expected: Any) -> None:
        right = isinstance(result, Embedding) and np.allclose(result.vector, expected, atol=1e-5)
        with self.lock:
            self.right += right
            self.wrong += not right

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        load = self

        class Counting(httpx.HTTPTransport):
            def handle_request(self, request: httpx.Request) -> httpx.Response:
                try:
                    response = super().handle_request(request)
                except httpx.TransportError:
                    response = None
                    raise
                finally:
                    if response is None or response.status_code != 200:
                        with load.lock:
                            load.broken += 1
                return response

        with httpx.Client(transport=Counting()) as http:
            yield Client(self.url, policy=self.policy, http=http)

    def wait_for(self, more: int) -> None:
        """Until so many more images are answered."""
        goal, deadline = self.right + more, time.monotonic() + 3 * PATIENCE
        while self.right < goal:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def vectors(engine: Engine) -> list[Any]:
    return [found.outputs["embedding"] for found in run_files(engine, [*PHOTOS.values()], ["embedding"])]


def metric(server: Server, name: str) -> float:
    """A sample of the server's metrics, by its name with labels; 0 before it exists."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.ask("GET", "/metrics")[1].decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


SEEN = 'mixmim_batch_size_sum{graph="encoder"}'  # images that reached the engine


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_server_that_ends_under_load_and_another_in_its_place_lose_nothing(
    exported_bundle: Path, tmp_path: Path, vectors: list[Any], end: signal.Signals
) -> None:
    (tmp_path / "second").mkdir()
    with serve(exported_bundle, tmp_path) as first, ThreadPoolExecutor(5) as threads:
        first.wait_until_ready()
        load = Load(f"http://127.0.0.1:{first.port}", vectors)
        jobs = [threads.submit(each) for each in (load.many, load.many, load.single, load.single, load.single)]
        try:
            load.wait_for(200)
            first.process.send_signal(end)
            assert first.wait(STOP) == (0 if end is signal.SIGTERM else -signal.SIGKILL)
            with serve(exported_bundle, tmp_path / "second", port=first.port) as second:
                load.wait_for(200)
                load.enough.set()
                for job in jobs:
                    job.result(PATIENCE)
                assert metric(second, SEEN) > 0
        finally:
            load.enough.set()
    assert load.broken >= 5  # every client met the gap
    assert (load.right, load.wrong) == (load.sent, 0)  # nothing lost, nothing mixed up


@pytest.mark.slow
def test_a_storm_of_deadlines_passes(exported_bundle: Path, tmp_path: Path) -> None:
    """Hundreds who wait a few milliseconds, behind photos that take longer than that to decode."""
    settings = ("decode_threads=1", "max_connections_per_client=500")
    with serve(exported_bundle, tmp_path, *settings) as server, ThreadPoolExecutor(3) as slow:
        server.wait_until_ready()
        large = png(4000)
        jobs = [slow.submit(server.ask, "POST", "/embed", large) for _ in range(3)]
        wait_until(lambda: metric(server, "mixmim_images_inside") == 3)
        statuses = asyncio.run(storm(server.port, 400))
        assert statuses.keys() <= {200, 504}
        assert statuses.total() == 400
        assert statuses[504] >= 350
        assert [job.result(PATIENCE)[0] for job in jobs] == [200] * 3
        began = time.monotonic()
        assert server.ask("POST", "/embed", HAT)[0] == 200
        assert time.monotonic() - began < 5  # 0.02 s on an idle machine
        assert metric(server, 'mixmim_failures_total{reason="deadline"}') == statuses[504]
        assert metric(server, SEEN) <= statuses[200] + 4 + 32  # whose time passed in the running batch were seen
        assert metric(server, "mixmim_images_inside") == 0


async def storm(port: int, requests: int) -> Counter[int]:
    """Statuses of so many requests at once, each with a few milliseconds of patience."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=PATIENCE) as client:

        async def ask(number: int) -> int:
            headers = {"x-request-timeout": str(0.002 + number % 10 / 1000), "content-type": "image/jpeg"}
            return (await client.post("/embed", content=HAT, headers=headers)).status_code

        return Counter(await asyncio.gather(*map(ask, range(requests))))


def test_nobody_whose_time_is_over_reaches_the_engine(engine: Engine) -> None:
    gate = Gate()
    with url_of(Around(engine, gate)) as (url, app), ThreadPoolExecutor(33) as threads:

        def ask(seconds: float) -> int:
            return httpx.post(f"{url}/embed", files=files(HAT), headers={"x-request-timeout": str(seconds)}).status_code

        first = threads.submit(ask, PATIENCE)
        assert gate.reached.wait(PATIENCE)
        assert [*threads.map(ask, [0.3] * 32)] == [504] * 32
        gate.release.set()
        assert first.result(PATIENCE) == 200
        assert ask(PATIENCE) == 200
        assert seen(app) == 2


def test_a_client_that_leaves_never_reaches_the_engine(engine: Engine) -> None:
    gate = Gate()
    with url_of(Around(engine, gate)) as (url, app), ThreadPoolExecutor(1) as threads:
        runtime = app.state.runtime
        first = threads.submit(httpx.post, f"{url}/embed", files=files(HAT), timeout=PATIENCE)
        assert gate.reached.wait(PATIENCE)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                connection = socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), PATIENCE)
                stack.enter_context(connection).sendall(post(len(HAT)) + HAT)
            wait_until(lambda: runtime.batchers["encoder"].queued == 20)  # decoded, and waiting
        wait_until(lambda: app.state.admission.images == 1)  # their places are free at once
        gate.release.set()
        assert first.result(PATIENCE).status_code == 200
        assert httpx.post(f"{url}/embed", files=files(HAT)).status_code == 200
        assert seen(app) == 2
        assert 'mixmim_failures_total{reason="client_left"} 20.0' in app.state.metrics.exposition().decode()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_full_disk_stops_no_upload(exported_bundle: Path, tmp_path: Path) -> None:
    """No file can grow by a byte, be it temporary or the log."""
    photo = noise()
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        size = server.log.stat().st_size
        url = f"http://127.0.0.1:{server.port}"
        assert len(photo) * 10 > 20e6
        answer = httpx.post(f"{url}/embed", files=files(*[photo] * 10), timeout=PATIENCE)
        assert [each["status"] for each in answer.json()["data"]] == ["ok"] * 10
        with Client(url) as client:
            assert all(isinstance(each, Embedding) for each in client.embed_many([photo] * 10))
        streamed = httpx.post(f"{url}/embed/stream", files=files(*[photo] * 10), timeout=PATIENCE)
        assert streamed.text.count('"status":"ok"') == 10
        assert server.log.stat().st_size == size  # the disk was full indeed


def seen(app: Any) -> float:
    """Images that reached the engine."""
    found = re.search(rf"^{re.escape(SEEN)} (\S+)$", app.state.metrics.exposition().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until(condition: Any) -> None:
    """Poll, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def png(side: int) -> bytes:
    """A large black picture in few bytes; with 36 megapixels it takes a tenth of a second and more to decode."""
    buffer = BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def noise() -> bytes:
    """A picture of 2.1 MB, above the size from which forms are commonly written to disk."""
    buffer = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (840, 840, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
