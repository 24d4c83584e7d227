"""The robustness set through every route and every form of body at once: each file gets its own answer, nobody else's.

A file's answer when it is alone on an idle server is what it must get in the crowd. The files in the repository always,
each on every route in one form; the full set of the project in every form, where it lies beside the checkout, under the
mark `slow`.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import itertools
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from serving import BAD, HAT, MODEL, NPZ, SHOES
from test_server import serve

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import preprocess

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

FULL = Path(__file__).parents[2] / "shared" / "data" / "robustness.tar"
CLIENTS = 32  # requests at once
ROOM = "max_waiting=4096"  # each stream takes places for its window of 64
MOST_MEMORY = 600 * 2**20  # of the server, afterwards

FORMS = ("multipart", "raw", "base64", "data URI")
ROUTES = {
    "/embed": FORMS,
    "/classify": FORMS,
    "/features?stages=stage2,stage4": FORMS,
    "/score?map=true": FORMS,
    "/reconstruct": ("multipart", "base64", "data URI"),  # needs two
    "/embed/stream": ("multipart", "base64", "data URI"),
    "/v1/embeddings": ("base64", "data URI"),
}


@dataclass(frozen=True)
class Answer:
    """What came back for one file: the arrays, or why there are none."""

    refusal: tuple[str, str | None] | None  # code and param
    arrays: dict[str, NDArray[Any]]

    def equals(self, other: Answer, atol: float) -> bool:
        """The same refusal, or the same numbers but for what another batch does to the last bits."""
        return (
            self.refusal == other.refusal
            and self.arrays.keys() == other.arrays.keys()
            and all(np.allclose(self.arrays[name], other.arrays[name], 1e-4, atol) for name in self.arrays)
        )


def request(route: str, form: str, image: bytes) -> dict[str, Any]:
    """One image, or for a pair this one and a photo, as httpx sends it."""
    images = [image, SHOES] if route == "/reconstruct" else [image]
    headers = NPZ if route.startswith(("/features", "/reconstruct")) else {}
    if form == "multipart":
        return {"files": [("image", ("a", each)) for each in images], "headers": headers}
    if form == "raw":
        return {"content": image, "headers": headers | {"content-type": "image/*"}}
    prefix = "data:image/jpeg;base64," if form == "data URI" else ""
    texts = [prefix + base64.b64encode(each).decode() for each in images]
    body: dict[str, Any] = {"input": texts if len(texts) > 1 else texts[0]}
    if route == "/embed/stream":
        return {"content": json.dumps(body), "headers": {"content-type": "application/x-ndjson"}}
    return {"json": body | ({"model": MODEL} if route.startswith("/v1") else {}), "headers": headers}


async def ask(client: httpx.AsyncClient, route: str, form: str, image: bytes) -> Answer:
    """Send one image and read what came; a refusal has the status of its kind."""
    response = await client.post(route, **request(route, form, image))
    if response.headers["content-type"].startswith("application/x-npz"):
        with np.load(BytesIO(response.content), allow_pickle=False) as found:
            return Answer(None, {name: found[name] for name in found if found[name].dtype.kind in "fb"})
    body = json.loads(response.content)  # of a stream one line
    status = {"undecodable_image": 422, "unsupported_image": 415, "image_too_large": 413}
    if "error" in body:
        error = body["error"]
        assert response.status_code == (200 if route == "/embed/stream" else status[error["code"]]), error
        return Answer((error["code"], error["param"]), {})
    assert response.status_code == 200
    return Answer(None, _numbers(body["data"][0] if route.startswith("/v1") else body))


def _numbers(body: dict[str, Any]) -> dict[str, NDArray[Any]]:
    if "classes" in body:
        guesses = sorted(body["classes"], key=lambda guess: guess["index"])
        return {"probabilities": np.array([guess["probability"] for guess in guesses])}
    return {name: np.array(value) for name, value in body.items() if name in ("embedding", "score", "map")}


def expected_refusal(image: bytes) -> tuple[str, str] | None:
    """What the one preprocessing says of a file."""
    try:
        preprocess(image, Preprocessing.evaluation(64))
    except ImageError as error:
        return error.code, "input[0]"
    return None


async def alone(client: httpx.AsyncClient, files: dict[str, bytes]) -> dict[tuple[str, str], Answer]:
    """Each file's answer on each route, one after the other."""
    return {
        (name, route): await ask(client, route, forms[0], image)
        for (name, image), (route, forms) in itertools.product(files.items(), ROUTES.items())
    }


async def crowd(
    client: httpx.AsyncClient, files: dict[str, bytes], right: dict[tuple[str, str], Answer], every_form: bool
) -> list[str]:
    """Everything at once, different routes side by side; what went wrong."""
    room, wrong = asyncio.Semaphore(CLIENTS), []

    async def check(name: str, route: str, form: str) -> None:
        async with room:
            answer = await ask(client, route, form, files[name])
        if not answer.equals(right[name, route], 1e-5):
            wrong.append(f"{name} on {route} as {form}: {answer.refusal}, alone {right[name, route].refusal}")

    jobs = []
    for number, (name, (route, forms)) in enumerate(itertools.product(files, ROUTES.items())):
        chosen = forms if every_form else [forms[number % len(forms)]]
        jobs += [check(name, route, form) for form in chosen]
    await asyncio.gather(*jobs)
    return wrong


@asynccontextmanager
async def good_traffic(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """Photos and probes, one after the other while everything else goes on; each must be answered as before."""
    right = {photo: await ask(client, "/embed", "raw", photo) for photo in (HAT, SHOES)}
    ended, asked = asyncio.Event(), 0

    async def go_on() -> None:
        nonlocal asked
        while not ended.is_set():
            for photo in (HAT, SHOES):
                assert (await ask(client, "/embed", "raw", photo)).equals(right[photo], 1e-5)
            assert (await client.get("/readyz")).status_code == 200
            asked += 1

    tasks = [asyncio.create_task(go_on()) for _ in range(2)]
    yield
    ended.set()
    await asyncio.gather(*tasks)
    assert asked >= 4


async def one_stream(client: httpx.AsyncClient, files: dict[str, bytes]) -> list[Answer]:
    """All files over one connection."""
    lines = [json.dumps({"input": base64.b64encode(image).decode()}) for image in files.values()]
    headers = {"content-type": "application/x-ndjson"}
    response = await client.post("/embed/stream", content="\n".join(lines), headers=headers)
    answers = []
    for index, line in enumerate(map(json.loads, response.text.splitlines())):
        assert line["index"] == index
        refusal = (line["error"]["code"], line["error"]["param"]) if line["status"] == "error" else None
        answers.append(Answer(refusal, _numbers(line)))
    return answers


async def ordeal(port: int, process: psutil.Process, files: dict[str, bytes], *, every_form: bool = False) -> None:
    """Alone, together, over one stream; then the server is well and small."""
    limits = httpx.Limits(max_connections=CLIENTS + 4, keepalive_expiry=2)  # the server hangs up after 5 s
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
        right = await alone(client, files)
        for (name, route), answer in right.items():
            assert answer.refusal == expected_refusal(files[name]), (name, route)
        async with good_traffic(client):
            wrong = await crowd(client, files, right, every_form)
            streamed = await one_stream(client, files)
        assert not wrong, "\n".join(wrong)
        for index, (name, answer) in enumerate(zip(files, streamed, strict=True)):
            once = right[name, "/embed/stream"]
            placed = Answer(once.refusal and (once.refusal[0], f"input[{index}]"), once.arrays)
            assert answer.equals(placed, 1e-5), name
        assert (await client.get("/readyz")).status_code == 200
        assert "mixmim_images_inside 0.0" in (await client.get("/metrics")).text
        assert 'status="500"' not in (await client.get("/metrics")).text
    assert process.memory_info().rss < MOST_MEMORY


def files_of(folder: Path) -> dict[str, bytes]:
    """Every image of a robustness set by name."""
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as rows:
        return {row["file"]: (folder / row["file"]).read_bytes() for row in csv.DictReader(rows)}


def test_every_file_through_every_route_and_form(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, ROOM) as server:
        server.wait_until_ready()
        asyncio.run(ordeal(server.port, psutil.Process(server.process.pid), files_of(BAD.parent)))


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason=f"the full robustness set is not at {FULL}")
def test_the_full_set_through_every_route_and_form(exported_bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(FULL) as tar:
        tar.extractall(tmp_path, filter="data")
    files = files_of(tmp_path / "robustness")
    with serve(exported_bundle, tmp_path, ROOM) as server:
        server.wait_until_ready()
        asyncio.run(ordeal(server.port, psutil.Process(server.process.pid), files, every_form=True))
