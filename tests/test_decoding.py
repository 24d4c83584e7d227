"""Decoding in fair order, in threads and in processes with limits."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import psutil
import pytest
from pictures import photo
from PIL import Image
from serving import HAT, PATIENCE

from mixmim_serve.config import Preprocessing
from mixmim_serve.containers import decode_cost
from mixmim_serve.errors import ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from mixmim_serve.preprocess import preprocess
from mixmim_serve.service import decode_process
from mixmim_serve.service.batcher import PendingDecodes
from mixmim_serve.service.decoding import SMALL, Decoder, Lane
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.fair_queue import FairQueue
from mixmim_serve.service.request import Admission, RequestContext, Reservation
from mixmim_serve.service.settings import Settings

PREPROCESSING = Preprocessing.evaluation(64)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


LARGE = encoded(photo(0).resize((3000, 2400)))
SLOW = encoded(Image.new("RGB", (8000, 7900)), "PNG")  # 63 megapixels in a small file


def context(client: str = "a", name: str = "1", admission: Admission | None = None) -> RequestContext:
    admission = admission or Admission(100, 10**9, 100, 1e12)
    return RequestContext(name, "POST", "/embed", None, Reservation(admission, client))


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(Settings(decode_threads=2), PREPROCESSING, PendingDecodes())
    yield made
    made.close()


def finish(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


# Order


def order(pushes: list[tuple[str, str, float]]) -> list[str]:
    """The order in which items of (client, request, cost) are served."""
    queue: FairQueue[str] = FairQueue()
    for client, request, cost in pushes:
        queue.push(client, request, f"{client}{request}", cost)
    assert len(queue) == len(pushes)
    served = []
    while (item := queue.pop()) is not None:
        served.append(item)
    return served


def test_a_client_with_one_image_passes_one_with_many() -> None:
    assert order([("a", "1", 5)] * 3 + [("b", "1", 1)]) == ["a1", "b1", "a1", "a1"]


def test_a_request_with_one_image_passes_another_of_the_same_client() -> None:
    assert order([("a", "1", 5)] * 3 + [("a", "2", 1)]) == ["a1", "a2", "a1", "a1"]


def test_cheap_images_are_served_as_often_as_their_cost_allows() -> None:
    pushes = [("a", "1", 4)] * 2 + [("b", "1", 1)] * 6
    assert order(pushes) == ["a1", "b1", "b1", "b1", "b1", "a1", "b1", "b1"]


# Lanes


def test_a_lane_runs_as_much_as_it_has_room_for() -> None:
    async def play() -> list[str]:
        lane, log = Lane(2), []

        async def work(name: str, weight: float) -> None:
            async with lane.slot(context(name), weight, 1):
                log.append(f"{name} in")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                log.append(f"{name} out")

        await asyncio.gather(work("a", 1), work("b", 9), work("c", 1))
        assert lane.used == 0
        return log

    # b takes all the room there is, so it runs alone; c does not pass it, or it would never run
    assert finish(play()) == ["a in", "a out", "b in", "b out", "c in", "c out"]


def test_whoever_leaves_gives_its_turn_back() -> None:
    async def play() -> None:
        lane = Lane(1)

        async def hold(entered: asyncio.Event) -> None:
            async with lane.slot(context(), 1, 1):
                entered.set()
                await asyncio.Event().wait()

        events = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(hold(event)) for event in events]
        await events[0].wait()
        tasks[1].cancel()  # while it waits
        tasks[0].cancel()  # while it runs
        await events[2].wait()
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert lane.used == 0

    finish(play())


# Threads and processes


@pytest.mark.parametrize("image", [HAT, LARGE])
def test_threads_and_processes_give_the_pixels_of_preprocessing(decoder: Decoder, image: bytes) -> None:
    np.testing.assert_array_equal(finish(decoder.decode(image, context())), preprocess(image, PREPROCESSING))
    assert bool(decoder.idle) == (decode_cost(image) > SMALL)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (b"", UndecodableImageError),
        (b"no image", UnsupportedImageError),
        (LARGE[: len(LARGE) // 2], UndecodableImageError),
        (bytes(20_000_001), ImageTooLargeError),
    ],
)
def test_refusals_are_those_of_preprocessing(decoder: Decoder, image: bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as expected:
        preprocess(image, PREPROCESSING)
    with pytest.raises(error) as caught:
        finish(decoder.decode(image, context()))
    assert str(caught.value) == str(expected.value)


def test_a_process_decodes_one_image_after_another(decoder: Decoder) -> None:
    finish(decoder.decode(LARGE, context()))
    (process,) = decoder.idle
    with pytest.raises(ImageError):
        finish(decoder.decode(LARGE[:100_000], context()))
    finish(decoder.decode(LARGE, context()))
    assert decoder.idle == [process]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read as Linux has it")
def test_a_process_gives_the_memory_of_an_image_back(decoder: Decoder) -> None:
    image = encoded(Image.new("RGB", (8000, 7900)), "WEBP", lossless=True, quality=0, method=0)
    for _ in range(2):  # the second one is where glibc would keep 250 MB and more
        finish(decoder.decode(image, context()))
    (process,) = decoder.idle
    assert process._process is not None
    deadline = time.monotonic() + PATIENCE
    while (kept := psutil.Process(process._process.pid).memory_info().rss) > 1.1 * decode_process.KEPT_BYTES:
        assert time.monotonic() < deadline, kept  # it gives memory back after its answer
        time.sleep(0.01)


def test_an_image_that_takes_too_long_ends_its_process_and_nothing_else() -> None:
    decoder = Decoder(Settings(decode_threads=2, decode_seconds=0.2), PREPROCESSING, PendingDecodes())
    with pytest.raises(UndecodableImageError, match=r"took more than 0\.2 s of CPU time"):
        finish(decoder.decode(SLOW, context()))
    assert not decoder.idle
    finish(decoder.decode(LARGE, context()))
    decoder.close()


def test_an_image_that_needs_too_much_memory_is_refused() -> None:
    decoder = Decoder(Settings(decode_threads=2, decode_bytes=64 * 2**20), PREPROCESSING, PendingDecodes())
    with pytest.raises(ImageTooLargeError, match="memory"):
        finish(decoder.decode(SLOW, context()))
    finish(decoder.decode(LARGE, context()))
    decoder.close()


def test_a_client_that_leaves_ends_the_decoding(decoder: Decoder) -> None:
    async def play() -> None:
        task = asyncio.create_task(decoder.decode(SLOW, context()))
        while not decoder.large.used:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not decoder.idle  # killed, not kept
        assert decoder.large.used == 0

    finish(play())


def test_what_a_client_left_is_finished_where_that_takes_less_than_a_new_process(decoder: Decoder) -> None:
    async def play() -> None:
        await decoder.decode(LARGE, context())
        processes = list(decoder.idle)
        task = asyncio.create_task(decoder.decode(LARGE, context()))
        while decoder.idle:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert decoder.idle == processes
        assert decoder.large.used == 0
        await decoder.decode(LARGE, context())
        assert decoder.idle == processes

    finish(play())


def test_a_client_that_leaves_while_a_process_starts_leaves_no_process(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    entered, release = threading.Event(), threading.Event()

    def slow_start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        entered.set()
        assert release.wait(PATIENCE)
        started.append(popen(*arguments, **options))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(decode_process.subprocess, "Popen", slow_start)

    async def play() -> None:
        task = asyncio.create_task(decoder.decode(SLOW, context()))
        assert await asyncio.to_thread(entered.wait, PATIENCE)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        release.set()
        await asyncio.get_running_loop().run_in_executor(decoder.process_threads, lambda: None)

    finish(play())
    decoder.process_threads.shutdown()
    assert started[0].wait(PATIENCE) == -signal.SIGKILL
    assert not decoder.idle


# Budgets


def test_a_request_that_costs_too_much_is_refused_before_any_of_it_is_decoded() -> None:
    decoder = Decoder(Settings(decode_threads=1, max_request_megapixels=100), PREPROCESSING, PendingDecodes())

    async def play() -> None:
        request = context()
        results = await asyncio.gather(*(decoder.decode(SLOW, request) for _ in range(2)), return_exceptions=True)
        assert [getattr(result, "code", None) for result in results] == ["too_much_to_decode"] * 2

    finish(play())
    assert decoder.process_threads._threads == set()  # none was started
    decoder.close()


def test_the_images_of_a_request_may_cost_so_much_together() -> None:
    decoder = Decoder(Settings(decode_threads=1, max_request_megapixels=1), PREPROCESSING, PendingDecodes())
    megapixel = encoded(photo(1).resize((1000, 1000)))

    async def play() -> None:
        request = context()
        await decoder.decode(megapixel, request)
        with pytest.raises(RequestError, match="costs more than 1 megapixels") as caught:
            await decoder.decode(megapixel, request)
        assert (caught.value.status, caught.value.code) == (413, "too_much_to_decode")
        assert not request.reservation.admission.client_cost

    finish(play())
    decoder.close()


def test_the_images_of_a_client_may_wait_for_so_much_together() -> None:
    admission = Admission(100, 10**9, 100, 1000)
    first, second = Reservation(admission, "a"), Reservation(admission, "a")
    first.add_cost(5000)  # one image alone always passes
    with pytest.raises(RequestError, match="of this client") as caught:
        second.add_cost(1)
    assert caught.value.status == 429
    Reservation(admission, "b").add_cost(900)
    first.remove_cost(5000)
    second.add_cost(900)
    second.remove_cost(900)


def test_a_client_may_hold_a_share_of_the_places() -> None:
    admission = Admission(4, 10**9, 2, 1e12)
    Reservation(admission, "a").reserve(2)
    with pytest.raises(RequestError, match="2 images of this client are waiting already"):
        Reservation(admission, "a").reserve(1)
    with Reservation(admission, "b") as other:
        other.reserve(2)
        with pytest.raises(RequestError, match="4 images are waiting already"):
            Reservation(admission, "c").reserve(1)
    Reservation(admission, "c").reserve(2)
    assert dict(admission.client_images) == {"a": 2, "c": 2}
