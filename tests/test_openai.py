"""OpenAI's own client, unmodified, against our routes over a real socket."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from serving import HAT, PATIENCE, PHOTOS, SHOES, Around, Gate, Starlette, url_of

from mixmim_serve.engines import Engine
from mixmim_serve.extract.pipeline import run_files

KEY = "k" * 20


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[tuple[str, Starlette]]:
    with url_of(engine) as served:
        yield served


def theirs(url: str, **options: Any) -> openai.OpenAI:
    """As everybody makes one; it wants a key even where the server needs none."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, **options)


@pytest.fixture
def client(served: tuple[str, Starlette]) -> Iterator[openai.OpenAI]:
    with theirs(served[0]) as client:
        yield client


@pytest.fixture
def name(served: tuple[str, Starlette]) -> str:
    return str(served[1].state.runtime.model_name)


@pytest.fixture(scope="module")
def vectors(engine: Engine) -> dict[str, Any]:
    found = run_files(engine, [*PHOTOS.values()], ["embedding"])
    return dict(zip(PHOTOS, (each.outputs["embedding"] for each in found), strict=True))


def uri(image: bytes) -> str:
    """An image as text."""
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def asked(app: Starlette) -> float:
    """How many requests for embeddings came, whatever became of them."""
    samples = [sample for metric in app.state.metrics.requests.collect() for sample in metric.samples]
    return sum(
        each.value for each in samples if each.name.endswith("_total") and each.labels["route"] == "/v1/embeddings"
    )


def times_asked(app: Starlette, before: float = 0) -> float:
    """The same less `before`; a request is counted just after its answer has gone."""
    deadline = time.monotonic() + PATIENCE
    while asked(app) <= before and time.monotonic() < deadline:
        time.sleep(0.005)
    return asked(app) - before


def test_one_image_as_base64_and_as_floats(client: openai.OpenAI, name: str, vectors: dict[str, Any]) -> None:
    default = client.embeddings.create(model=name, input=uri(HAT))  # asks for base64 and decodes it
    floats = client.embeddings.create(model=name, input=uri(HAT), encoding_format="float")
    for found in (default, floats):
        assert np.array_equal(np.array(found.data[0].embedding, np.float32), vectors["hat"])
        assert (found.object, found.model, found.data[0].index) == ("list", name, 0)
        assert found.usage.total_tokens == found.usage.prompt_tokens == 4
    raw = client.embeddings.create(model=name, input=uri(HAT), encoding_format="base64").data[0].embedding
    assert isinstance(raw, str)
    assert np.array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), vectors["hat"])


def test_many_images_in_order(client: openai.OpenAI, name: str, vectors: dict[str, Any]) -> None:
    found = client.embeddings.create(model=name, input=[uri(path.read_bytes()) for path in PHOTOS.values()])
    assert [each.index for each in found.data] == [*range(len(PHOTOS))]
    for each, expected in zip(found.data, vectors.values(), strict=True):
        np.testing.assert_allclose(each.embedding, expected, atol=1e-5)


def test_the_async_client(served: tuple[str, Starlette], name: str, vectors: dict[str, Any]) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served[0]}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(client.embeddings.create(model=name, input=uri(HAT)) for _ in range(8)))

    for found in asyncio.run(ask()):
        np.testing.assert_allclose(found.data[0].embedding, vectors["hat"], atol=1e-5)


def test_models(client: openai.OpenAI, name: str, served: tuple[str, Starlette]) -> None:
    assert [each.id for each in client.models.list()] == [name]
    found = client.models.retrieve(name)
    assert (found.id, found.owned_by) == (name, "mixmim-serve")
    fingerprint = served[1].state.runtime.fingerprint
    assert client.models.retrieve(fingerprint).model_dump()["fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("asked_for", "error", "code", "param"),
    [
        ({"input": uri(HAT[:1500])}, openai.UnprocessableEntityError, "undecodable_image", "input[0]"),
        ({"input": [uri(HAT), uri(b"")]}, openai.UnprocessableEntityError, "undecodable_image", "input[1]"),
        ({"input": uri(b"text")}, openai.APIStatusError, "unsupported_image", "input[0]"),
        ({"input": "https://x.org/a.jpg"}, openai.BadRequestError, "url", "input[0]"),
        ({"input": "a cat"}, openai.BadRequestError, "not_base64", "input[0]"),
        ({"input": [[1, 2]]}, openai.BadRequestError, "not_base64", "input[0]"),
        ({"input": []}, openai.BadRequestError, "no_image", "input"),
        ({"input": [uri(HAT)] * 65}, openai.APIStatusError, "too_many_images", "input"),
        ({"input": uri(HAT), "dimensions": 7}, openai.BadRequestError, "bad_option", "dimensions"),
        ({"input": uri(HAT), "model": "other"}, openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_a_wrong_request_is_a_typed_error_and_asked_once(
    client: openai.OpenAI,
    name: str,
    served: tuple[str, Starlette],
    asked_for: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
) -> None:
    before = asked(served[1])
    with pytest.raises(error) as caught:
        client.embeddings.create(**({"model": name} | asked_for))
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert caught.value.body["message"].endswith(".")  # type: ignore[index]
    assert caught.value.request_id
    assert times_asked(served[1], before) == 1


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="unknown model 'other'"):
        client.models.retrieve("other")


def test_a_wrong_key_is_an_authentication_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMIM_API_KEYS", KEY)
    with url_of(engine) as (url, app):
        with theirs(url) as client:
            assert client.models.list().data[0].id == app.state.runtime.model_name
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x" * 20) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.embeddings.create(model="m", input=uri(HAT))
            assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        assert times_asked(app) == 1


def test_a_full_server_is_a_rate_limit_after_its_own_waits(engine: Engine) -> None:
    gate = Gate()
    with (
        url_of(Around(engine, gate), max_waiting=1) as (url, app),
        theirs(url, max_retries=2) as client,
        ThreadPoolExecutor(1) as other,
    ):
        name = app.state.runtime.model_name
        first = other.submit(client.embeddings.create, model=name, input=uri(HAT))
        assert gate.reached.wait(PATIENCE)
        app.state.admission.retry_after = lambda: 0.75  # between its own first waits of 0.5 s and 1 s
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as caught:
            client.embeddings.create(model=name, input=uri(SHOES))
        seconds = time.monotonic() - began
        assert times_asked(app, 2) == 1  # three in all: the first request is not over yet
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        assert caught.value.response.headers["retry-after-ms"] == "750"
        assert seconds >= 1.5
        gate.release.set()
        assert first.result(PATIENCE).data


def test_a_busy_server_is_asked_again_until_it_has_room(engine: Engine, vectors: dict[str, Any]) -> None:
    gate = Gate()
    with (
        url_of(Around(engine, gate), max_waiting=1) as (url, app),
        theirs(url) as client,
        ThreadPoolExecutor(2) as other,
    ):
        app.state.admission.retry_after = lambda: 0.2
        jobs = [other.submit(client.embeddings.create, model=app.state.runtime.model_name, input=uri(HAT))]
        assert gate.reached.wait(PATIENCE)
        jobs.append(other.submit(client.embeddings.create, model=app.state.runtime.model_name, input=uri(SHOES)))
        deadline = time.monotonic() + PATIENCE
        while not asked(app):  # refused once
            assert time.monotonic() < deadline
            time.sleep(0.005)
        gate.release.set()
        found = [job.result(PATIENCE).data[0].embedding for job in jobs]
    for each, expected in zip(found, ("hat", "shoes"), strict=True):
        np.testing.assert_allclose(each, vectors[expected], atol=1e-5)
