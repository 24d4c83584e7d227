"""Our client against the true app: each call, each error, thousands of images, and sync = async."""

from __future__ import annotations

import asyncio
import itertools
import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from serving import BAD, HAT, PATIENCE, PHOTOS, SHOES, Around, Gate, app_of, take_out, url_of

from mixmim_serve.client import AsyncClient, Client, Embedding, Policy
from mixmim_serve.client.images import encoded
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.errors import (
    ConfigError,
    ImageError,
    ImageTooLargeError,
    MixMIMError,
    ModelChangedError,
    RefusedError,
    ServerError,
    UnavailableError,
    UndecodableImageError,
    UnsupportedImageError,
)
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.preprocess import decode, preprocess
from mixmim_serve.tasks import reconstruct_pair

QUICK = Policy(first_wait=0.01, longest_wait=0.05, total=PATIENCE)
ONCE = Policy(retries=0, total=PATIENCE)
TRUNCATED = HAT[:1500]


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with url_of(engine) as (url, _):
        yield url


@pytest.fixture
def ours(url: str) -> Iterator[Client]:
    with Client(url, policy=QUICK) as client:
        yield client


@pytest.fixture(scope="module")
def vectors(engine: Engine) -> list[Any]:
    return [found.outputs["embedding"] for found in run_files(engine, [*PHOTOS.values()], ["embedding"])]


# Calls


def test_embed_gives_the_engines_vector(ours: Client, engine: Engine, vectors: list[Any]) -> None:
    found = ours.embed(PHOTOS["hat"])
    index = [*PHOTOS].index("hat")
    assert (found.model, found.fingerprint) == (ours.model().model, engine_fingerprint(engine))
    assert np.array_equal(found.vector, vectors[index])
    assert np.array_equal(ours.embed(HAT).vector, found.vector)
    unit = ours.embed(HAT, normalize=True, dtype="float16").vector
    assert unit.dtype == np.float16
    np.testing.assert_allclose(unit, found.vector / np.linalg.norm(found.vector), atol=1e-3)


@pytest.mark.parametrize("rotated", [False, True])
def test_pixels_are_sent_as_they_are_seen(ours: Client, rotated: bool) -> None:
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6 if rotated else 1
    Image.open(BytesIO(HAT)).save(buffer, "PNG", exif=exif)
    expected = ours.embed(buffer.getvalue()).vector
    image = Image.open(buffer)
    assert np.array_equal(ours.embed(image).vector, expected)
    turned = np.rot90(np.array(image), -1) if rotated else np.array(image)
    assert np.array_equal(ours.embed(turned).vector, expected)
    assert np.array_equal(ours.embed(HAT).vector, expected) is not rotated


@pytest.mark.parametrize(
    ("image", "error", "sentence"),
    [
        (np.zeros((8, 8, 3), np.float32), UnsupportedImageError, "uint8 RGB of shape"),
        (np.zeros((8, 8), np.uint8), UnsupportedImageError, "uint8 RGB of shape"),
        (Image.new("CMYK", (8, 8)), ImageError, "convert it to RGB"),
        (Path("missing.jpg"), ImageError, "cannot read missing.jpg: no such file"),
        (7, UnsupportedImageError, "must be bytes, a path"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(image: Any, error: type[ImageError], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        encoded(image)
    assert type(caught.value) is error


def test_classify_features_score_and_reconstruct(ours: Client, engine: Engine) -> None:
    (expected,) = run_files(engine, [PHOTOS["hat"]], ["logits", "stage2", "stage4"])
    classes = ours.classify(HAT, top=2).classes
    best = np.argsort(-expected.outputs["logits"])[:2]
    assert [guess.index for guess in classes] == best.tolist()
    assert len(ours.classify(HAT, top=None).classes) == 3

    stages = ours.features(HAT, ["stage2", "stage4"]).stages
    assert np.array_equal(stages["stage2"], expected.outputs["stage2"])
    tokens = ours.features(HAT, layout="tokens", dtype="float16").stages["stage4"]
    dim = len(expected.outputs["stage4"])
    np.testing.assert_allclose(tokens.T, expected.outputs["stage4"].reshape(dim, -1), atol=1e-2)

    score = ours.score(HAT, masks=1, with_map=True)
    assert score.map is not None
    assert score.score == pytest.approx(float(score.map.mean()), rel=1e-5)
    assert ours.score(HAT).map is None

    found = ours.reconstruct(HAT, SHOES, seed=3)
    a, b = (preprocess(image, engine.bundle.description.preprocessing) for image in (HAT, SHOES))
    for name, array in reconstruct_pair(engine, a, b, 0.5, 3).items():
        assert np.array_equal(getattr(found, name), array), name


def test_model_and_ready(ours: Client, engine: Engine) -> None:
    found = ours.model()
    assert (found.embedding_size, found.labels) == (64, ("cat", "dog", "owl"))
    assert "embedding" in found.outputs["encoder"]
    assert found.about["fingerprint"] == found.fingerprint
    assert ours.ready() is True
    assert Client("http://127.0.0.1:9", policy=QUICK).ready() is False


def test_the_example_of_the_documents_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (REPOSITORY / "docs" / "client.md").read_text().splitlines()
    begin = lines.index("    from mixmim_serve.client import Client")
    code = itertools.takewhile(lambda line: not line or line.startswith("    "), lines[begin:])
    monkeypatch.chdir(REPOSITORY)
    values: dict[str, Any] = {"paths": [*PHOTOS.values()]}
    exec(textwrap.dedent("\n".join(code)).replace("http://127.0.0.1:3000", url), values)  # noqa: S102
    assert values["result"].vector.shape == (64,)


# Errors


@pytest.mark.parametrize(
    ("image", "error"),
    [(b"bad", UnsupportedImageError), (TRUNCATED, UndecodableImageError), (b"", UndecodableImageError)],
)
def test_a_refused_image_is_an_error_that_names_it(ours: Client, image: bytes, error: type[ImageError]) -> None:
    for call in (ours.embed, ours.classify, ours.features, ours.score):
        with pytest.raises(error) as caught:
            call(image)
        assert (type(caught.value), caught.value.param) == (error, "input[0]")
    with pytest.raises(error) as caught:
        ours.reconstruct(HAT, image)
    assert caught.value.param == "input[1]"


def test_what_is_wrong_with_a_request_is_said_once(engine: Engine, bundle_copy: Path) -> None:
    headless = open_engine(take_out(bundle_copy, "head"), "onnx", threads=1)
    with url_of(headless, max_image_bytes=len(HAT)) as (url, app), Client(url, policy=QUICK) as client:
        with pytest.raises(RefusedError, match="no classification head") as caught:
            client.classify(HAT)
        assert (caught.value.status, caught.value.code) == (404, "not_in_this_model")
        with pytest.raises(RefusedError, match="stages must be of") as caught:
            client.features(HAT, ["stage9"])
        assert (caught.value.status, caught.value.param) == (400, "stages")
        with pytest.raises(ImageTooLargeError):
            client.embed(HAT + b" ")
        counted = app.state.metrics.exposition().decode()
    for line in ('route="/classify",status="404"} 1.0', 'route="/features",status="400"} 1.0'):
        assert line in counted  # and not asked again


def test_a_wrong_key_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMIM_API_KEYS", "k" * 20)
    with url_of(engine) as (url, _):
        with Client(url, policy=QUICK, api_key="k" * 20) as client:
            assert client.embed(HAT).vector.shape == (64,)
        with pytest.raises(RefusedError, match="unknown API key") as caught, Client(url, api_key="x" * 20) as client:
            client.embed(HAT)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("url", ["127.0.0.1:3000", "ftp://x", "http://", "http://x?y=z", ""])
def test_a_url_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=r"such as http://127\.0\.0\.1:3000"):
        Client(url)


@pytest.mark.parametrize("key", ["", " ", "key\n", "clé"])
def test_a_key_that_cannot_be_sent_is_refused_at_once(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        AsyncClient("http://x", api_key=key)


@pytest.mark.parametrize("values", [{"read": 0}, {"total": float("nan")}, {"retries": -1}])
def test_a_policy_that_cannot_work_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be"):
        Policy(**values)


@pytest.mark.parametrize("content", [b"<html>hello</html>", b"{}", b"[]", b"", b"\x08" + bytes(7) + b"{}      "])
def test_something_else_at_that_address_is_an_error_of_ours(content: bytes) -> None:
    http = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=content)))
    client = Client("http://x", http=http)
    for call in (client.embed, client.classify, client.score):
        with pytest.raises(ServerError, match="cannot be read"):
            call(HAT)
    with pytest.raises(ServerError, match="cannot be read"):
        client.model()


# Many


def test_many_come_in_order_with_errors_in_their_places(ours: Client, vectors: list[Any], tmp_path: Path) -> None:
    paths = [*PHOTOS.values()]
    bad = {5: b"bad", 6: TRUNCATED, 17: tmp_path / "missing.jpg", 40: b""}
    images = [bad.get(index, paths[index % len(paths)]) for index in range(50)]
    found = [*ours.embed_many(iter(images), per_request=4, in_flight=3)]
    assert len(found) == 50
    for index, result in enumerate(found):
        if isinstance(result, Embedding):
            np.testing.assert_allclose(result.vector, vectors[index % len(paths)], atol=1e-5)
        else:
            assert result.param == f"input[{index}]"
    kinds = {index: type(result) for index, result in enumerate(found) if not isinstance(result, Embedding)}
    assert kinds == {5: UnsupportedImageError, 6: UndecodableImageError, 17: ImageError, 40: UndecodableImageError}


@pytest.mark.parametrize("name", ["per_request", "in_flight", "patience"])
def test_options_of_many_that_cannot_work_are_refused(ours: Client, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        [*ours.embed_many([HAT], **{name: 0})]


def test_only_bad_images_are_only_errors(ours: Client) -> None:
    found = [*ours.embed_many([b"bad"] * 5, per_request=4)]
    assert [type(each) for each in found] == [UnsupportedImageError] * 5
    assert [*ours.embed_many([])] == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_no_more_are_inside_than_the_window(engine: Engine, kind: str) -> None:
    gate = Gate()
    gate.release.set()
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        while taken < 200:
            taken += 1
            yield HAT

    def check(answered: int) -> None:
        inside = taken - answered
        most.append(inside)

    most: list[int] = []

    async def ask(url: str) -> int:
        async with AsyncClient(url) as client:
            answered = 0
            async for _ in client.embed_many(images(), per_request=4, in_flight=3):
                answered += 1
                check(answered)
            return answered

    with url_of(Around(engine, gate)) as (url, _):
        if kind == "async":
            assert asyncio.run(ask(url)) == 200
        else:
            with Client(url) as client:
                for answered, _ in enumerate(client.embed_many(images(), per_request=4, in_flight=3), 1):
                    check(answered)
    assert taken == 200
    assert max(most) <= 3 * 4
    assert max(most) >= 2 * 4  # and the window is used


def test_requests_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch, ours: Client) -> None:
    sizes: list[int] = []
    real = httpx.Client.send

    def send(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        sizes.append(len(request.read()))
        return real(self, request, **options)

    monkeypatch.setattr("mixmim_serve.client.many.PACK_BYTES", 3 * len(HAT))
    monkeypatch.setattr(httpx.Client, "send", send)
    assert len([*ours.embed_many([HAT] * 7)]) == 7
    assert len(sizes) == 3
    assert max(sizes) < 3 * len(HAT) + 1000


def test_a_server_that_takes_less_is_given_less(engine: Engine) -> None:
    with url_of(engine, max_items=3, max_body_bytes=5 * len(HAT) // 2) as (url, _), Client(url, policy=QUICK) as client:
        found = [*client.embed_many([HAT] * 8 + [HAT * 3])]
    assert [type(each) for each in found] == [Embedding] * 8 + [ImageTooLargeError]


def test_an_image_on_which_the_server_fails_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes, **limits: int) -> object:
        if data == SHOES:
            raise MemoryError("secret")
        return decode(data, **limits)

    monkeypatch.setattr("mixmim_serve.service.decoding.decode", fail)
    with url_of(engine) as (url, _), Client(url, policy=QUICK) as client:
        found = [*client.embed_many([HAT, HAT, SHOES, HAT, HAT])]
        with pytest.raises(ServerError, match="500: the server failed on this request"):
            client.embed(SHOES)
    assert [type(each) for each in found] == [Embedding, Embedding, ServerError, Embedding, Embedding]
    assert found[2].param == "input[2]"


def test_a_model_that_changes_on_the_way_is_an_error(engine: Engine) -> None:
    with url_of(engine) as (url, app), Client(url, policy=QUICK) as client:
        right = app.state.runtime.fingerprint

        def images() -> Iterator[bytes]:
            for index in range(40):
                if index == 20:
                    app.state.runtime.fingerprint = "another"
                yield HAT

        with pytest.raises(ModelChangedError, match=f"from {right} to another, and embeddings of"):
            [*client.embed_many(images(), per_request=2, in_flight=1)]
        app.state.runtime.fingerprint = right
        found = [*client.embed_many(images(), per_request=2, in_flight=1, same_model=False)]
    assert {each.fingerprint for each in found if isinstance(each, Embedding)} == {right, "another"}


def test_leaving_in_the_middle_leaves_nothing_behind(engine: Engine) -> None:
    with url_of(engine) as (url, _), Client(url, policy=QUICK) as client:
        found = client.embed_many([HAT] * 100, per_request=2)
        assert isinstance(next(found), Embedding)
        found.close()  # `url_of` looks whether anything is left inside


# Sync = async


def test_async_gives_what_sync_gives(ours: Client, url: str, engine: Engine) -> None:
    """Over a socket and straight into the app, each call and each kind of error."""
    images = [HAT, SHOES, TRUNCATED] * 7

    async def ask(client: AsyncClient) -> list[Any]:
        async with client:
            found: list[Any] = [await client.embed(PHOTOS["hat"], normalize=True), await client.classify(HAT, top=1)]
            found += [await client.features(HAT, ["stage1"]), await client.score(HAT, masks=1)]
            found += [await client.reconstruct(HAT, SHOES), await client.model(), await client.ready()]
            found += [each async for each in client.embed_many(images, per_request=4)]
            try:
                await client.embed(TRUNCATED)
            except MixMIMError as error:
                found.append(error)
            return found

    expected: list[Any] = [ours.embed(PHOTOS["hat"], normalize=True), ours.classify(HAT, top=1)]
    expected += [ours.features(HAT, ["stage1"]), ours.score(HAT, masks=1)]
    expected += [ours.reconstruct(HAT, SHOES), ours.model(), ours.ready(), *ours.embed_many(images, per_request=4)]
    with pytest.raises(UndecodableImageError) as caught:
        ours.embed(TRUNCATED)
    expected.append(caught.value)

    app = app_of(engine)
    transport = httpx.ASGITransport(app)
    inside = AsyncClient("http://app", policy=QUICK, http=httpx.AsyncClient(transport=transport))
    for client in (AsyncClient(url, policy=QUICK), inside):
        found = asyncio.run(ask(client))
        assert len(found) == len(expected) == 29
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    app.state.runtime.close()


def same(one: Any, other: Any) -> None:
    """To the last bit for what came alone; images of one request may have had other neighbours in their batch."""
    assert type(one) is type(other)
    if isinstance(one, MixMIMError):
        assert (str(one), one.param) == (str(other), other.param)
    elif isinstance(one, np.ndarray):
        np.testing.assert_allclose(one, other, atol=1e-6)
    elif hasattr(one, "__dict__"):
        for name, value in vars(one).items():
            same(value, getattr(other, name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    else:
        assert one == other


def test_an_async_source_of_images(url: str) -> None:
    async def source() -> Any:
        for _ in range(9):
            await asyncio.sleep(0)
            yield PHOTOS["hat"]

    async def ask() -> list[Any]:
        async with AsyncClient(url) as client:
            return [found.vector async for found in client.embed_many(source(), per_request=4)]

    assert np.stack(asyncio.run(ask())).shape == (9, 64)


def test_a_cancelled_call_is_cancelled(engine: Engine) -> None:
    gate = Gate()

    async def ask(url: str) -> None:
        async with AsyncClient(url, policy=ONCE) as client:
            job = asyncio.create_task(client.embed(HAT))
            await asyncio.to_thread(gate.reached.wait, PATIENCE)
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
        gate.release.set()

    with url_of(Around(engine, gate)) as (url, _):
        asyncio.run(ask(url))


def test_a_server_that_takes_too_long_is_given_up(engine: Engine) -> None:
    gate = Gate()
    policy = Policy(read=0.2, total=0.5, first_wait=0.01)
    with url_of(Around(engine, gate)) as (url, app), Client(url, policy=policy) as client:
        with pytest.raises(UnavailableError, match=r"/embed failed after \d attempts in 0\.\d s"):
            client.embed(HAT)
        gate.release.set()
        counted = app.state.metrics.exposition().decode()
    assert 'mixmim_failures_total{reason="deadline"}' in counted  # told by X-Request-Timeout, the server gave up too


def test_bad_files_are_refused_as_they_are(ours: Client) -> None:
    paths = sorted(path for path in BAD.iterdir() if path.is_file() and path.suffix != ".heif")  # which may be read
    found = [*ours.embed_many(paths)]
    assert len(found) == len(paths) >= 5
    assert all(isinstance(each, ImageError) for each in found)
