"""Several heads over one network: chosen by URL, form, client and command; one run of the engine serves them all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from heading import COLOURS, SHAPES, softmax, with_named_heads
from safetensors.numpy import load
from serving import (
    HAT,
    IDENTITY,
    NPY,
    PATIENCE,
    SHOES,
    Around,
    Gate,
    TestClient,
    client_of,
    files,
    refusal,
    take_out,
    url_of,
)
from test_cli import Mixmim, assert_one_sentence, mixmim  # noqa: F401 - a fixture

from mixmim_serve.bundle import open_bundle
from mixmim_serve.client import AsyncClient, Client
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import RefusedError
from mixmim_serve.heads import Head, read_heads, write_heads
from mixmim_serve.preprocess import preprocess
from mixmim_serve.publish.card import model_card

SAFETENSORS = {"accept": "application/x-safetensors"}


@pytest.fixture(scope="module")
def several(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine whose bundle has the heads main (the default), colours and shapes."""
    folder = tmp_path_factory.mktemp("several") / "small"
    folder.mkdir()
    open_bundle(exported_bundle).copy(folder)
    with_named_heads(folder)
    return open_engine(folder, "onnx", threads=1)


@pytest.fixture(scope="module")
def client(several: Engine) -> Iterator[TestClient]:
    with client_of(several) as client:
        yield client


def expected(engine: Engine, image: bytes, name: str) -> np.ndarray:
    """The probabilities of a head for an image, computed apart from the service."""
    head = read_heads(engine.bundle).choose(name)
    pixels = preprocess(image, engine.bundle.description.preprocessing)[None]
    arrays = engine.run("encoder", {"pixels": pixels}, head.inputs)
    return softmax(head.logits({key: array[0] for key, array in arrays.items()}))


@pytest.mark.parametrize(
    ("name", "classes"), [("colours", COLOURS), ("shapes", SHAPES), ("main", ("cat", "dog", "owl"))]
)
def test_the_url_chooses_the_head(client: TestClient, several: Engine, name: str, classes: tuple[str, ...]) -> None:
    body = client.post(f"/classify?head={name}", files=files(HAT)).json()
    probabilities = expected(several, HAT, name)
    order = np.argsort(-probabilities)
    assert [guess["label"] for guess in body["classes"]] == [classes[index] for index in order]
    assert [guess["probability"] for guess in body["classes"]] == pytest.approx(probabilities[order], abs=1e-6)
    assert body.keys() - {"classes"} == IDENTITY | (set() if name == "main" else {"head"})
    assert body.get("head") == (None if name == "main" else name)


def test_without_a_name_the_default_answers_as_before_there_were_names(client: TestClient, engine: Engine) -> None:
    with client_of(engine) as before:
        old = before.post("/classify?top=2", files=files(HAT, SHOES)).json()
    new = client.post("/classify?top=2", files=files(HAT, SHOES)).json()
    assert new == old  # to the last key and bit


def test_a_form_may_name_the_head(client: TestClient) -> None:
    by_url = client.post("/classify?head=colours", files=files(HAT)).json()
    assert client.post("/classify", files=files(HAT), data={"head": "colours"}).json() == by_url
    assert client.post("/classify?head=colours", files=files(HAT), data={"head": "colours"}).json() == by_url
    both = client.post("/classify?head=shapes", files=files(HAT), data={"head": "colours"})
    assert refusal(both) == (
        400, "head must be the same in the URL and the form ('shapes' in the URL), got 'colours'.", "head"
    )  # fmt: skip
    as_file = [*files(HAT), ("head", ("head.txt", b"colours"))]  # no text: some other field
    assert "head" not in client.post("/classify", files=as_file).json()


@pytest.mark.parametrize("form", [False, True])
def test_an_unknown_head_is_refused_in_one_sentence_with_the_names(client: TestClient, form: bool) -> None:
    names = {"data": {"head": "hats"}} if form else {"params": {"head": "hats"}}
    response = client.post("/classify", files=files(HAT), **names)
    assert refusal(response) == (400, "head must be one of main, colours, shapes, got 'hats'.", "head")
    assert response.json()["error"]["code"] == "bad_option"


def test_top_goes_as_far_as_the_classes_of_the_head(client: TestClient) -> None:
    assert len(client.post("/classify?head=colours&top=4", files=files(HAT)).json()["classes"]) == 4
    for head, most in (("shapes", 2), ("main", 3), ("colours", 4)):
        for given in (
            {"params": {"head": head, "top": most + 1}},
            {"params": {"top": most + 1}, "data": {"head": head}},
        ):
            status, message, param = refusal(client.post("/classify", files=files(HAT), **given))
            assert (status, param) == (400, "top")
            assert message == f"top must be a whole number from 1 to {most}, got '{most + 1}'."


def test_binary_formats_hold_the_probabilities_of_the_head(client: TestClient, several: Engine) -> None:
    npy = client.post("/classify?head=colours", files=files(HAT, SHOES), headers=NPY)
    array = np.load(BytesIO(npy.content), allow_pickle=False)
    assert array.shape == (2, 4)
    np.testing.assert_allclose(array, [expected(several, image, "colours") for image in (HAT, SHOES)], atol=1e-5)
    tensors = client.post("/classify?head=shapes", files=files(HAT), headers=SAFETENSORS).content
    assert load(tensors)["probabilities"].shape == (1, 2)
    header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
    assert header["__metadata__"]["head"] == "shapes"


def test_two_heads_share_a_batch_and_the_network_runs_once(several: Engine) -> None:
    gate = Gate()
    around = Around(several, gate)
    with client_of(around) as client, ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(client.post, "/embed", files=files(HAT))]
        assert gate.reached.wait(PATIENCE)
        asked = [("colours", HAT), ("shapes", SHOES), ("colours", SHOES)]
        jobs += [threads.submit(client.post, f"/classify?head={name}", files=files(image)) for name, image in asked]
        deadline = time.monotonic() + PATIENCE
        while client.app.state.runtime.batchers["encoder"].queued < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.release.set()
        bodies = [job.result(PATIENCE).json() for job in jobs]
    assert [sorted(outputs) for _, outputs in around.ran] == [["embedding"], ["embedding", "stage3"]]
    for (name, image), body in zip(asked, bodies[1:], strict=True):
        assert body["head"] == name
        best = expected(several, image, name)
        assert body["classes"][0]["probability"] == pytest.approx(best.max(), abs=1e-5)


def test_many_clients_with_different_heads_each_get_their_own(client: TestClient, several: Engine) -> None:
    names, images = ("main", "colours", "shapes"), (HAT, SHOES)
    right = {(name, image): expected(several, image, name) for name in names for image in images}

    def ask(number: int) -> bool:
        name, image = names[number % 3], images[number % 2]
        body = client.post(f"/classify?head={name}&top=1", files=files(image)).json()
        (guess,) = body["classes"]
        known = right[name, image]
        return guess["index"] == known.argmax() and abs(guess["probability"] - known.max()) < 1e-5

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(48), timeout=60))


def test_an_image_whose_logits_overflow_is_refused_alone(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    weight = np.full((2, 64), np.finfo(np.float32).max, np.float32) * np.array([[1], [-1]], np.float32)
    huge = Head("huge", ("a", "b"), ("embedding",), {}, weight, np.zeros(2, np.float32))
    write_heads(bundle, read_heads(bundle).plus(huge))
    with client_of(open_engine(bundle_copy, "onnx", threads=1)) as client, np.errstate(all="ignore"):
        status, message, param = refusal(client.post("/classify?head=huge", files=files(HAT)))
        assert client.post("/classify", files=files(HAT)).status_code == 200
    assert (status, param) == (422, "input[0]")
    assert message == "the logits of this image have inf or NaN: send another image."


def test_a_network_without_a_head_answers_with_a_named_one(bundle_copy: Path) -> None:
    with_named_heads(take_out(bundle_copy, "head"), default="shapes")
    engine = open_engine(bundle_copy, "onnx", threads=1)
    with client_of(engine) as client:
        body = client.post("/classify", files=files(HAT)).json()
        about = client.get("/model").json()
        status, message, _ = refusal(client.post("/classify?head=main", files=files(HAT)))
    assert body["head"] == "shapes"
    assert body["classes"][0]["probability"] == pytest.approx(expected(engine, HAT, "shapes").max(), abs=1e-6)
    assert (status, message) == (400, "head must be one of colours, shapes, got 'main'.")
    assert about["labels"] == [*SHAPES]
    assert [(head["name"], head["default"]) for head in about["heads"]] == [("colours", False), ("shapes", True)]


def test_model_lists_the_heads_with_classes_and_accuracies(client: TestClient) -> None:
    about = client.get("/model").json()
    main, colours, _ = about["heads"]
    assert (main["name"], main["default"], main["classes"]) == ("main", True, ["cat", "dog", "owl"])
    assert about["labels"] == main["classes"]
    assert colours["classes"] == [*COLOURS]
    assert colours["accuracy"] == {"top1": 61.25, "ece": 2.5, "images": 80, "judged_on": "80 validation photos"}
    assert len(colours["fingerprint"]) == 32


def test_the_clients_choose_heads(several: Engine) -> None:
    async def ask(url: str) -> tuple[object, ...]:
        async with AsyncClient(url) as theirs:
            found = await theirs.classify(HAT, head="colours", top=1)
            return found.head, found.classes

    with url_of(several) as (url, _), Client(url) as ours:
        found = ours.classify(HAT, head="colours", top=1)
        assert (found.head, found.classes) == asyncio.run(ask(url))
        assert found.classes[0].label == COLOURS[int(expected(several, HAT, "colours").argmax())]
        assert ours.classify(HAT).head is None
        assert ours.model().heads == {"main": ("cat", "dog", "owl"), "colours": COLOURS, "shapes": SHAPES}
        with pytest.raises(RefusedError, match="head must be one of main, colours, shapes, got 'hats'"):
            ours.classify(HAT, head="hats")


def test_the_command_chooses_heads(mixmim: Mixmim, several: Engine, tmp_path: Path) -> None:  # noqa: F811
    photo = tmp_path / "hat.jpg"
    photo.write_bytes(HAT)
    bundle = several.bundle.path
    (line,) = mixmim("classify", bundle, photo, "--head", "shapes", "--engine", "onnx").lines
    assert line["head"] == "shapes"
    assert line["classes"][0]["probability"] == pytest.approx(expected(several, HAT, "shapes").max(), abs=1e-5)
    (line,) = mixmim("classify", bundle, photo, "--engine", "onnx").lines
    assert line.keys() == {"path", "classes"}
    assert_one_sentence(
        mixmim("classify", bundle, photo, "--head", "hats"), "unknown head 'hats': choose one of main, colours, shapes"
    )
    about = json.loads(mixmim("info", bundle).out)
    assert [head["name"] for head in about["heads"]] == ["main", "colours", "shapes"]


def test_the_model_card_lists_the_heads(several: Engine, exported_bundle: Path) -> None:
    card = model_card(several.bundle, "me/shapes")
    assert "| main (default) | 3 | cat, dog, owl | not measured |" in card
    measured = "top-1 61.2 %, calibration error 2.5 % (80 validation photos)"
    assert f"| colours | 4 | blue, green, red, yellow | {measured} |" in card
    assert "mixmim classify bundles/shapes photo.jpg --head main" in card
    plain = model_card(open_bundle(exported_bundle), "me/shapes")
    assert "## Heads" not in plain
    assert "mixmim classify bundles/shapes photo.jpg\n" in plain
