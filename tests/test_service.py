"""The HTTP routes over the true engine: every answer, and every refusal of what a client sent."""

from __future__ import annotations

import base64
import json
import socket
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import (
    BAD,
    CLASS_NAMES,
    HAT,
    IDENTITY,
    JPEG,
    MODEL,
    NPY,
    NPZ,
    PHOTOS,
    SHOES,
    Around,
    TestClient,
    client_of,
    files,
    refusal,
    take_out,
)

from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.engines.certificate import certify
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.preprocess import preprocess
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.settings import Settings
from mixmim_serve.tasks import random_mask, reconstruct_pair

MAX_ITEMS = Settings().max_items

# Answers


def test_embed_one_image_three_ways_to_the_last_bit(client: TestClient, engine: Engine) -> None:
    (expected,) = run_files(engine, [PHOTOS["hat"]], ["embedding"])
    form = client.post("/embed", files=files(HAT))
    raw = client.post("/embed", content=HAT, headers=JPEG)
    npy = client.post("/embed", files=files(HAT), headers=NPY)
    assert [form.status_code, raw.status_code, npy.status_code] == [200, 200, 200]
    assert form.json().keys() == {"embedding"} | IDENTITY
    assert form.json() == raw.json()
    assert form.json()["fingerprint"] == engine_fingerprint(engine)
    array = np.load(BytesIO(npy.content), allow_pickle=False)
    assert (npy.headers["content-type"], array.shape, array.dtype) == ("application/x-npy", (1, 64), np.float32)
    assert np.array_equal(array[0], expected.outputs["embedding"])
    assert np.array_equal(np.array(form.json()["embedding"], np.float32), expected.outputs["embedding"])


def test_embed_several_images_in_order(client: TestClient, engine: Engine) -> None:
    expected = np.stack(
        [result.outputs["embedding"] for result in run_files(engine, [*PHOTOS.values()], ["embedding"])]
    )
    images = files(*(path.read_bytes() for path in PHOTOS.values()))
    body = client.post("/embed", files=images).json()
    assert body.keys() == {"data"} | IDENTITY
    assert [item["index"] for item in body["data"]] == list(range(len(PHOTOS)))
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], expected, atol=1e-5)
    array = np.load(BytesIO(client.post("/embed", files=images, headers=NPY).content), allow_pickle=False)
    assert (array.shape, array.dtype) == ((len(PHOTOS), 64), np.float32)
    np.testing.assert_allclose(array, expected, atol=1e-5)


def test_classify_gives_the_best_classes_first(client: TestClient, engine: Engine) -> None:
    (result,) = run_files(engine, [PHOTOS["hat"]], ["logits"])
    logits = result.outputs["logits"].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    body = client.post("/classify?top=3", files=files(HAT)).json()
    assert body.keys() == {"classes"} | IDENTITY
    assert [guess["index"] for guess in body["classes"]] == np.argsort(-expected).tolist()
    for guess in body["classes"]:
        assert guess["label"] == CLASS_NAMES[guess["index"]]
        assert guess["probability"] == pytest.approx(expected[guess["index"]], abs=1e-6)
    assert sum(guess["probability"] for guess in body["classes"]) == pytest.approx(1)
    one = client.post("/classify?top=1", files=files(HAT)).json()
    assert one["classes"] == body["classes"][:1]
    every = client.post("/classify", files=files(HAT)).json()  # the default of 5 is no demand for 5 classes
    assert every["classes"] == body["classes"]
    several = client.post("/classify?top=1", files=files(SHOES, HAT)).json()["data"]
    assert [item["index"] for item in several] == [0, 1]
    assert several[1]["classes"][0]["label"] == one["classes"][0]["label"]


def test_reconstruct_as_arrays(client: TestClient, engine: Engine) -> None:
    response = client.post("/reconstruct?seed=3&ratio=0.75", files=files(HAT, SHOES), headers=NPZ)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-npz")
    arrays = dict(np.load(BytesIO(response.content), allow_pickle=False))
    images = {"image_a", "image_b", "mixed", "reconstruction_a", "reconstruction_b"}
    assert arrays.keys() == images | {"from_partner"} | IDENTITY
    assert {arrays[name].shape for name in images} == {(3, 64, 64)}
    assert {arrays[name].dtype for name in images} == {np.dtype(np.float32)}
    assert arrays["from_partner"].tolist() == random_mask(4, 0.75, 3).tolist()
    assert arrays["from_partner"].sum() == 3
    covered = np.kron(arrays["from_partner"].reshape(2, 2), np.ones((32, 32), np.bool_))
    assert np.array_equal(arrays["mixed"], np.where(covered, arrays["image_b"], arrays["image_a"]))
    a, b = (preprocess(image, engine.bundle.description.preprocessing) for image in (HAT, SHOES))
    for name, array in reconstruct_pair(engine, a, b, 0.75, 3).items():
        assert np.array_equal(arrays[name], array), name


def test_reconstruct_as_a_panel(client: TestClient) -> None:
    panels = [
        client.post(f"/reconstruct{query}", files=files(HAT, SHOES)) for query in ("", "?seed=0&ratio=0.5", "?seed=2")
    ]
    assert {panel.headers["content-type"] for panel in panels} == {"image/png"}
    with Image.open(BytesIO(panels[0].content)) as panel:
        assert (panel.format, panel.mode, panel.size) == ("PNG", "RGB", (5 * (256 + 8) + 8, 28 + 256 + 8))
    assert panels[0].content == panels[1].content
    assert panels[0].content != panels[2].content


def test_model_says_what_is_served(client: TestClient, engine: Engine) -> None:
    body = client.get("/model").json()
    assert body == {
        "model": MODEL,
        "fingerprint": engine_fingerprint(engine),
        "model_fingerprint": engine.bundle.fingerprint,
        "engine_fingerprint": engine_fingerprint(engine),
        "bundle": engine.bundle.fingerprint,
        "size": "custom",
        "engine": certify(engine).summary(),
        **json.loads(json.dumps(engine.bundle.description.to_dict())),
        "anomaly": None,
        "embedding_size": 64,
        "heads": [
            {"default": True, "name": "main", "classes": CLASS_NAMES, "inputs": ["logits"], "fingerprint": ""},
        ],
        "outputs": {graph: list(outputs) for graph, outputs in engine.bundle.graphs.items()},
    }
    assert body["labels"] == CLASS_NAMES
    served = body["engine"]
    assert (served["engine"], served["precision"], served["holds"]) == ("onnx-cpu", "fp32", True)


def test_warm_up_runs_every_graph(engine: Engine, bundle_copy: Path) -> None:
    both, one = Around(engine, list), Around(open_engine(take_out(bundle_copy, "decoder"), "onnx", threads=1), list)
    for around in (both, one):
        runtime = Runtime(around)
        around.ran.clear()  # of what the certificate may have run
        runtime.warm_up()
        runtime.close()
    assert [graph for graph, _ in both.ran] == ["encoder", "reconstruct"]
    assert [graph for graph, _ in one.ran] == ["encoder"]


@pytest.mark.parametrize(("part", "route"), [("head", "/classify"), ("decoder", "/reconstruct"), ("decoder", "/score")])
def test_a_bundle_without_the_part_answers_404(bundle_copy: Path, part: str, route: str) -> None:
    with client_of(open_engine(take_out(bundle_copy, part), "onnx", threads=1)) as client:
        status, message, _ = refusal(client.post(route, files=files(HAT, SHOES)))
        assert client.post("/embed", files=files(HAT)).status_code == 200
    assert status == 404
    assert f"this model has no {'classification head' if part == 'head' else 'decoder'}: " in message


# Refusals


@pytest.mark.parametrize(
    ("image", "status", "sentence"),
    [
        (b"", 422, "the image is empty"),
        (HAT[: len(HAT) // 2], 422, "is truncated"),
        (b"just text, no image", 415, "not an image of an accepted format"),
        (HAT + bytes(20_000_001 - len(HAT)), 413, "has 20,000,001 bytes"),
        ((BAD / "gen__bomb_60000x60000.bmp").read_bytes(), 413, "the limit is 64,000,000 in all"),
    ],
    ids=["empty", "truncated", "text", "bytes", "pixels"],
)
def test_bad_images_are_refused_by_name(client: TestClient, image: bytes, status: int, sentence: str) -> None:
    for response in (
        client.post("/embed", files=files(image)),
        client.post("/embed", content=image, headers=JPEG),
        client.post("/embed", json={"input": base64.b64encode(image).decode()}),
    ):
        assert refusal(response)[::2] == (status, "input[0]")
        assert sentence in refusal(response)[1]


def test_a_bad_image_does_not_harm_those_beside_it(client: TestClient) -> None:
    response = client.post("/embed", files=files(HAT, HAT[:900], b"text", SHOES))
    assert response.status_code == 200
    data = response.json()["data"]
    assert [(item["index"], item["status"]) for item in data] == [(0, "ok"), (1, "error"), (2, "error"), (3, "ok")]
    assert [data[1]["error"]["param"], data[1]["error"]["code"]] == ["input[1]", "undecodable_image"]
    assert [data[2]["error"]["param"], data[2]["error"]["code"]] == ["input[2]", "unsupported_image"]
    for item, image in ((data[0], HAT), (data[3], SHOES)):
        alone = client.post("/embed", files=files(image)).json()["embedding"]
        np.testing.assert_allclose(item["embedding"], alone, atol=1e-5)


def test_several_images_of_which_none_is_good_answer_422(client: TestClient) -> None:
    response = client.post("/embed", files=files(HAT[:900], b"text"))
    body = response.json()
    assert (response.status_code, body["error"]["param"], body["error"]["code"]) == (422, "input", "no_good_image")
    assert [item["error"]["param"] for item in body["data"]] == ["input[0]", "input[1]"]


@pytest.mark.parametrize("route", ["/classify", "/features", "/score"])
def test_every_route_refuses_a_bad_image(client: TestClient, route: str) -> None:
    assert refusal(client.post(route, files=files(HAT[:900])))[::2] == (422, "input[0]")


def test_reconstruct_needs_both_images_good(client: TestClient) -> None:
    assert refusal(client.post("/reconstruct", files=files(HAT, HAT[:900])))[::2] == (422, "input[1]")


def test_an_url_is_not_an_image(client: TestClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/hat.jpg"
        response = client.post("/embed", files=[("image", (None, url))])
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody came
            listener.accept()
    assert refusal(response)[::2] == (400, "input[0]")
    assert "must be a file, not text" in refusal(response)[1]


def test_forms_that_hold_no_image_are_refused(client: TestClient) -> None:
    status, message, param = refusal(client.post("/embed", files=[("photo", ("hat.jpg", HAT))]))
    assert (status, param) == (400, "image")
    assert "no field 'image'" in message
    multipart = {"content-type": "multipart/form-data"}
    assert refusal(client.post("/embed", content=b"", headers=multipart))[0] == 400  # no boundary
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    assert refusal(client.post("/embed", content=b"no parts", headers=multipart))[0] == 400


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "text/plain"])
def test_other_content_types_are_refused(client: TestClient, kind: str) -> None:
    status, message, _ = refusal(client.post("/embed", content=HAT, headers={"content-type": kind} if kind else {}))
    assert status == 415
    assert f"content type {kind or 'missing'!r} is not accepted" in message


@pytest.mark.parametrize("count", [MAX_ITEMS + 1, MAX_ITEMS + 5])
def test_too_many_images_are_refused(client: TestClient, count: int) -> None:
    status, message, param = refusal(client.post("/embed", files=files(*[HAT] * count)))
    assert (status, param) == (413, "image")
    assert f"more than {MAX_ITEMS}" in message


def test_as_many_images_as_allowed_are_taken(client: TestClient) -> None:
    assert len(client.post("/embed", files=files(*[HAT] * MAX_ITEMS)).json()["data"]) == MAX_ITEMS


@pytest.mark.parametrize("count", [1, 3])
def test_reconstruct_needs_two_images(client: TestClient, count: int) -> None:
    status, message, param = refusal(client.post("/reconstruct", files=files(*[HAT] * count)))
    assert (status, param) == (400, "input")
    assert f"got {count} images, need two" in message


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("classify?top=0", "top"),
        ("classify?top=4", "top"),
        ("classify?top=1.5", "top"),
        ("classify?top=many", "top"),
        ("reconstruct?seed=-1", "seed"),
        ("reconstruct?seed=0.5", "seed"),
        ("reconstruct?seed=4294967296", "seed"),
        ("reconstruct?ratio=1.5", "ratio"),
        ("reconstruct?ratio=nan", "ratio"),
        ("reconstruct?ratio=half", "ratio"),
        ("reconstruct?ratio=0", "ratio"),  # in range, but covers none of these units
        ("reconstruct?ratio=1", "ratio"),
    ],
)
def test_numbers_out_of_range_are_refused(client: TestClient, query: str, param: str | None) -> None:
    status, message, named = refusal(client.post(f"/{query}", files=files(HAT, SHOES)))
    assert (status, named) == (400, param)
    assert query.partition("=")[2] in message


def test_unknown_routes_and_methods_answer_in_the_same_shape(client: TestClient) -> None:
    assert refusal(client.get("/nothing"))[0] == 404
    response = client.get("/embed")
    assert refusal(response)[0] == 405
    assert response.headers["allow"] == "POST"
