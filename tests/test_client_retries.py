"""When our client tries again, how long it waits and when it gives up: by a clock of its own and a flaky transport."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from email.utils import formatdate
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from serving import free_port

from mixmim_serve.client import AsyncClient, Client, Policy
from mixmim_serve.client.answers import Reply
from mixmim_serve.client.calls import MODEL, embed
from mixmim_serve.client.retry import ConnectionRefused, Send, Wait, attempts, retry_after
from mixmim_serve.errors import MixMIMError, RefusedError, ServerError, UnavailableError, UndecodableImageError

GOOD = Reply(
    200, {}, save({"embedding": np.ones((1, 4), np.float32)}, {"model": "tiny", "fingerprint": "f", "errors": "{}"})
)
BUSY = Reply(
    429, {"retry-after": "2", "retry-after-ms": "1500"}, b'{"error": {"message": "full.", "code": "queue_full"}}'
)
BROKEN = httpx.ReadError("broken")
CALL = embed([b"image"], False, "float32")
KEY = "k" * 20
BAD_IMAGE = b'{"error": {"message": "damaged.", "code": "undecodable_image", "param": "input[0]"}}'


class Clock:
    """Time that passes when somebody waits, or a request is on its way."""

    def __init__(self, *outcomes: Any, seconds: float = 0.0) -> None:
        self.now, self.seconds = 100.0, seconds
        self.outcomes = itertools.chain(outcomes, itertools.repeat(outcomes[-1]))
        self.sent: list[Send] = []
        self.waits: list[float] = []

    def run(self, steps: Generator[Any, Any, Any]) -> Any:
        """Drive the steps to their end."""
        outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None
            if isinstance(step, Wait):
                self.waits.append(step.seconds)
                self.now += step.seconds
            else:
                self.sent.append(step)
                self.now += min(self.seconds, step.seconds)
                outcome = next(self.outcomes)


def run(policy: Policy, *outcomes: Any, seconds: float = 0.0) -> tuple[Clock, Any]:
    """The clock afterwards, and the result or error."""
    clock = Clock(*outcomes, seconds=seconds)
    try:
        return clock, clock.run(attempts(CALL, policy, lambda: clock.now))
    except MixMIMError as error:
        return clock, error


def test_waits_double_up_to_the_longest_less_by_chance() -> None:
    clock, error = run(Policy(retries=6, first_wait=1, longest_wait=8, total=1000), BROKEN)
    assert isinstance(error, UnavailableError)
    assert len(clock.sent) == 7
    for wait, most in zip(clock.waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert most / 2 <= wait <= most
    assert len(set(clock.waits)) == 6


def test_the_server_says_how_long_to_wait() -> None:
    clock, found = run(Policy(), BUSY, BUSY, GOOD)
    assert found[0].vector.tolist() == [1, 1, 1, 1]
    assert all(1.5 <= wait <= 1.5 * 1.25 for wait in clock.waits)
    assert len(clock.waits) == 2


def test_all_tries_are_one_request_with_what_is_left_of_its_time() -> None:
    policy = Policy(total=10, read=6, connect=2, first_wait=1, longest_wait=1)
    clock, error = run(policy, BROKEN, seconds=3)
    assert len({send.headers["X-Request-Id"] for send in clock.sent}) == 1
    began = [100.0]
    for wait in clock.waits:
        began.append(began[-1] + 3 + wait)
    for send, when in zip(clock.sent, began, strict=True):
        left = 110 - when
        assert send.seconds == pytest.approx(left)
        assert float(send.headers["X-Request-Timeout"]) == pytest.approx(min(6, left), abs=1e-3)
        assert send.timeout.read == pytest.approx(min(6, left))
        assert send.timeout.connect == pytest.approx(min(2, left))
    assert clock.now <= 110
    assert str(error) == (
        f"/embed failed after {len(clock.sent)} attempts in {clock.now - 100:.1f} s (broken): "
        "check that the server is running, or allow more time."
    )
    assert error.request == clock.sent[0].headers["X-Request-Id"]


def test_a_wait_beyond_the_end_is_not_begun() -> None:
    clock, error = run(Policy(total=10), Reply(503, {"retry-after": "60"}, b""))
    assert (clock.waits, len(clock.sent), clock.now) == ([], 1, 100.0)
    assert (error.status, type(error)) == (503, UnavailableError)
    assert "after 1 attempt in 0.0 s; the last response was 503: the server gave no reason" in str(error)


def test_without_a_number_of_retries_only_time_counts() -> None:
    clock, _ = run(Policy(retries=None, total=1000, first_wait=0.1, longest_wait=1), BROKEN)
    assert len(clock.sent) > 900
    assert run(Policy(retries=0), BROKEN)[0].waits == []


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_these_are_tried_again(status: int) -> None:
    clock, found = run(Policy(), Reply(status, {}, b"<html>"), GOOD)
    assert (len(clock.sent), found[0].fingerprint) == (2, "f")


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (422, BAD_IMAGE, UndecodableImageError),
        (400, b"{}", RefusedError),
        (401, b"", RefusedError),
        (404, b"<html>", RefusedError),
        (406, b"", RefusedError),
        (500, b"", ServerError),
        (501, b"", ServerError),
        (302, b"", ServerError),
    ],
)
def test_these_are_not(status: int, content: bytes, error: type[Exception]) -> None:
    clock, found = run(Policy(), Reply(status, {}, content), GOOD)
    assert (type(found), len(clock.sent)) == (error, 1)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "-3"}, 0),
        ({"retry-after": formatdate(0)}, 0),
        ({"retry-after": "later"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date() -> None:
    found = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert found == pytest.approx(30, abs=2)


def test_a_refused_connection_is_final_until_the_server_has_answered() -> None:
    clock, error = run(Policy(), ConnectionRefused("http://x", was_reached=False), seconds=0.04)
    assert (type(error), len(clock.sent), clock.waits) == (UnavailableError, 1, [])
    assert str(error) == (
        "/embed failed after 1 attempt in 0.0 s, connection refused by http://x: start the server with `mixmim serve` "
        "and wait until it is ready, or check the URL."
    )
    restarting = ConnectionRefused("http://x", was_reached=True)
    clock, found = run(Policy(), restarting, restarting, GOOD)
    assert (len(clock.sent), len(clock.waits), found[0].fingerprint) == (3, 2, "f")
    clock, error = run(Policy(first_wait=1, retries=2), restarting, seconds=1)
    assert f"/embed failed after 3 attempts in {clock.now - 100:.1f} s, connection refused by http://x: " in str(error)


# The same through httpx, in both clients


def flaky(failures: list[Any], requests: list[httpx.Request]) -> Callable[[httpx.Request], httpx.Response]:
    """A transport that fails as it is told, then answers."""

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        failure = failures[len(requests) - 1] if len(requests) <= len(failures) else None
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:
            return httpx.Response(failure, headers={"retry-after-ms": "10"})
        return httpx.Response(200, content=GOOD.content)

    return handle


def ask(kind: str, transport: Any, policy: Policy) -> Any:
    """One embedding, by either client."""
    if kind == "sync":
        return Client("http://x", api_key=KEY, policy=policy, http=httpx.Client(transport=transport)).embed(b"image")
    client = AsyncClient("http://x", api_key=KEY, policy=policy, http=httpx.AsyncClient(transport=transport))
    return asyncio.run(client.embed(b"image"))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_both_clients_get_through(kind: str) -> None:
    failures = [httpx.ConnectError("refused"), 503, httpx.RemoteProtocolError("closed"), 429, httpx.ReadTimeout("slow")]
    requests: list[httpx.Request] = []
    found = ask(kind, httpx.MockTransport(flaky(failures, requests)), Policy(first_wait=0.001, longest_wait=0.001))
    assert found.vector.tolist() == [1, 1, 1, 1]
    assert len(requests) == 6
    assert len({request.headers["x-request-id"] for request in requests}) == 1
    assert {request.headers["authorization"] for request in requests} == {f"Bearer {KEY}"}
    assert len({len(request.content) for request in requests}) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_nobody_listens(kind: str, host: str) -> None:
    """At a real port, as the operating system refuses it; `localhost` may be two addresses, and both refuse."""
    began = time.monotonic()
    url = f"http://{host}:{free_port()}"

    def embed() -> object:
        return Client(url).embed(b"i") if kind == "sync" else asyncio.run(AsyncClient(url).embed(b"i"))

    with pytest.raises(UnavailableError, match=rf"after 1 attempt in \d\.\d s, connection refused by {url}"):
        embed()
    assert time.monotonic() - began < 5  # retries would take 10 s at least
    assert Client(url).ready() is False


def test_a_server_that_was_there_is_waited_for() -> None:
    refused = httpx.ConnectError("refused")
    refused.__cause__ = ConnectionRefusedError(111, "Connection refused")
    answers: list[Any] = [None, refused, refused, None]
    requests: list[httpx.Request] = []
    http = httpx.Client(transport=httpx.MockTransport(flaky(answers, requests)))
    client = Client("http://x", policy=Policy(first_wait=0.001, longest_wait=0.001), http=http)
    client.embed(b"image")
    assert client.embed(b"image").vector.tolist() == [1, 1, 1, 1]
    assert len(requests) == 4


class Trickle(httpx.SyncByteStream, httpx.AsyncByteStream):
    """An answer without an end."""

    def __iter__(self) -> Iterator[bytes]:
        while True:
            time.sleep(0.02)
            yield b" "

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b" "


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_answer_that_trickles_is_given_up_at_the_end_of_the_time(kind: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Trickle()))
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="the response was not complete in time"):
        ask(kind, transport, Policy(total=0.3))
    assert 0.25 < time.monotonic() - began < 5


def test_leaving_many_in_the_middle_ends_their_retries() -> None:
    tries = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        if b"first" in request.read():  # by its content: requests are sent from two threads
            return httpx.Response(200, content=GOOD.content)
        raise httpx.ConnectError("refused")

    policy = Policy(first_wait=0.05, longest_wait=0.05)
    client = Client("http://x", policy=policy, http=httpx.Client(transport=httpx.MockTransport(handle)))
    found = client.embed_many([b"first", *[b"i"] * 8], per_request=1, in_flight=2)
    next(found)
    found.close()
    time.sleep(0.2)
    before = tries
    time.sleep(0.3)
    assert tries == before


def test_many_end_with_the_error_when_nobody_answers() -> None:
    transport = httpx.MockTransport(flaky([503] * 99, []))
    client = Client("http://x", http=httpx.Client(transport=transport))
    with pytest.raises(UnavailableError, match="the last response was 503"):
        [*client.embed_many([b"i"] * 9, patience=0.2)]


def test_get_needs_no_body() -> None:
    clock = Clock(Reply(404, {}, b""))
    with pytest.raises(RefusedError):
        clock.run(attempts(MODEL, Policy(), lambda: clock.now))
    assert clock.sent[0].call.images == ()
