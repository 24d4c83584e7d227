"""The HTTP routes when it gets hard: bodies without end, no room, a failing engine, many clients at once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving import HAT, JPEG, PATIENCE, PHOTOS, SHOES, Around, Gate, TestClient, app_of, client_of, files, refusal

from mixmim_serve.engines import Engine
from mixmim_serve.errors import EngineError
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.preprocess import decode
from mixmim_serve.service.app import create_app
from mixmim_serve.service.settings import Settings

MAX_BODY_BYTES = Settings().max_body_bytes

# Limits


def send(body: Iterator[bytes], headers: Mapping[str, str], engine: Engine) -> tuple[int, dict[str, Any], int]:
    """Status, answer and number of chunks that the app took; the test client would read the whole body itself."""
    app = app_of(engine)
    taken, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": next(body), "more_body": True}

    async def answer(message: dict[str, Any]) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": pairs}
    asyncio.run(asyncio.wait_for(app(scope, receive, answer), PATIENCE))
    app.state.runtime.close()
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:])), taken


def endless(first: bytes = b"") -> Iterator[bytes]:
    """Chunks of 1 MiB."""
    yield first.ljust(2**20, b"\0")
    while True:
        yield bytes(2**20)


def test_a_body_announced_as_too_large_is_not_read(engine: Engine) -> None:
    headers = {**JPEG, "content-length": str(MAX_BODY_BYTES + 1)}
    status, body, taken = send(endless(), headers, engine)
    assert (status, taken) == (413, 0)
    assert "above 32 MiB" in body["error"]["message"]


@pytest.mark.parametrize("kind", ["raw", "multipart"])
def test_an_endless_body_is_read_up_to_the_limit(engine: Engine, kind: str) -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + HAT
    first, headers = {"raw": (HAT, JPEG), "multipart": (part, {"content-type": "multipart/form-data; boundary=x"})}[
        kind
    ]
    status, body, taken = send(endless(first), headers, engine)
    assert (status, taken) == (413, MAX_BODY_BYTES // 2**20 + 1)
    assert "above 32 MiB" in body["error"]["message"]


def test_a_client_that_leaves_is_no_fault_of_the_server(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(engine)
    messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def answer(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"image/jpeg")]
    scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": headers}
    asyncio.run(asyncio.wait_for(app(scope, receive, answer), PATIENCE))  # raises nothing
    app.state.runtime.close()
    assert sent[0]["status"] == 400
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_more_images_than_room_are_refused(engine: Engine) -> None:
    gate = Gate()
    with client_of(Around(engine, gate), max_waiting=3) as client, ThreadPoolExecutor(1) as other:
        two = other.submit(client.post, "/embed", files=files(HAT, SHOES))
        assert gate.reached.wait(PATIENCE)
        admission = client.app.state.admission
        assert admission.images == 2
        response = client.post("/embed", files=files(HAT, SHOES))
        assert admission.images == 2
        gate.release.set()
        assert two.result(PATIENCE).status_code == 200
        assert client.post("/embed", files=files(HAT, SHOES)).status_code == 200  # there is room again
    assert refusal(response)[0] == 429
    assert "2 images are waiting already" in refusal(response)[1]
    assert response.headers["retry-after"] == "1"


def test_nothing_stays_in_flight(client: TestClient) -> None:
    admission = client.app.state.admission
    for route, images in (("/embed", [HAT]), ("/embed", [HAT, b"bad"]), ("/reconstruct", [HAT, b"bad"])):
        client.post(route, files=files(*images))
        assert admission.images == 0


def test_no_engine_yet_answers_503() -> None:
    with TestClient(create_app()) as client:
        for response in (client.post("/embed", files=files(HAT)), client.get("/model")):
            assert refusal(response)[0] == 503
            assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("error", [EngineError, RuntimeError])
@pytest.mark.parametrize("route", ["/embed", "/classify", "/reconstruct"])
def test_a_failing_engine_tells_only_the_log(
    engine: Engine, error: type[Exception], route: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error(f"secret of {engine.bundle.path}")

    with client_of(Around(engine, fail)) as client, caplog.at_level(logging.ERROR):
        response = client.post(route, files=files(HAT, SHOES))
    status, message, param = refusal(response)
    assert (status, param) == (500, None)
    assert message == "the server failed on this request; its log has the reason."
    assert "secret of" in str(caplog.records[0].exc_info)


def test_a_failure_while_decoding_is_ours_not_the_clients(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes, **limits: Any) -> object:
        if data == SHOES:
            raise MemoryError("secret")
        return decode(data, **limits)

    monkeypatch.setattr("mixmim_serve.service.decoding.decode", fail)
    with client_of(engine) as client:
        response = client.post("/embed", files=files(HAT, SHOES))
    assert refusal(response)[0] == 500  # and not one vector for two images
    assert "secret" not in response.text


# Many clients


def test_sixteen_clients_get_their_own_answers(client: TestClient, engine: Engine) -> None:
    expected = [result.outputs["embedding"] for result in run_files(engine, [*PHOTOS.values()], ["embedding"])]
    images = [path.read_bytes() for path in PHOTOS.values()]

    def ask(number: int) -> int:
        choice = number % len(images)
        bad = number % 10 == 9
        response = client.post("/embed", files=files(images[choice][:1500] if bad else images[choice]))
        if not bad:
            np.testing.assert_allclose(response.json()["embedding"], expected[choice], atol=1e-5)
        return response.status_code

    with ThreadPoolExecutor(16) as threads:
        statuses = Counter(threads.map(ask, range(160), timeout=60))
    assert statuses == {200: 144, 422: 16}
    assert client.app.state.admission.images == 0


def test_requests_that_wait_share_a_batch(engine: Engine) -> None:
    gate = Gate()
    around = Around(engine, gate)
    with client_of(around) as client, ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(client.post, "/embed", files=files(HAT))]
        assert gate.reached.wait(PATIENCE)
        jobs += [threads.submit(client.post, route, files=files(HAT)) for route in ("/embed", "/classify", "/embed")]
        deadline = time.monotonic() + PATIENCE
        while client.app.state.runtime.batchers["encoder"].queued < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.release.set()
        assert [job.result(PATIENCE).status_code for job in jobs] == [200] * 4
    assert [sorted(outputs) for _, outputs in around.ran] == [["embedding"], ["embedding", "logits"]]
