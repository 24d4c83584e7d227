"""What the routes answer beyond one vector of one image: other forms, features, scores, streams, OpenAI's shape."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load
from serving import HAT, IDENTITY, JPEG, MODEL, NPY, NPZ, PHOTOS, SHOES, TestClient, client_of, files, refusal

from mixmim_serve.engines import Engine
from mixmim_serve.preprocess import normalize, preprocess
from mixmim_serve.service.responses import json_bytes
from mixmim_serve.tasks import reconstruct_inputs, scoring_masks, unit_errors

SAFETENSORS = {"accept": "application/x-safetensors"}
NDJSON = {"content-type": "application/x-ndjson"}


def uri(image: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def encoded(engine: Engine, image: bytes, *outputs: str) -> dict[str, NDArray[Any]]:
    """What the engine gives for one image alone."""
    pixels = preprocess(image, engine.bundle.description.preprocessing)[None]
    return {name: array[0] for name, array in engine.run("encoder", {"pixels": pixels}, outputs).items()}


# JSON in


def test_json_takes_data_uris_and_base64(client: TestClient) -> None:
    form = client.post("/embed", files=files(HAT)).json()
    for text in (uri(HAT), base64.b64encode(HAT).decode(), uri(HAT, "image/png;name=x")):
        assert client.post("/embed", json={"input": text}).json() == form  # one text: a flat answer
    several = client.post("/embed", json={"input": [uri(HAT), uri(SHOES)]}).json()["data"]
    assert [item["status"] for item in several] == ["ok", "ok"]
    assert len(client.post("/embed", json={"input": [uri(HAT)]}).json()["data"]) == 1  # a list: a list


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"{}", 400, "must be a string or a list"),
        (b'{"input": []}', 400, "input is empty"),
        (b'{"input": 3}', 400, "must be a string or a list"),
        (b'{"input": "x", "normalise": true}', 400, "unknown key 'normalise'"),
        (b'{"input": "not base64!"}', 400, "not base64"),
        (b'{"input": "http://127.0.0.1:1/hat.jpg"}', 400, "URLs are not fetched"),
        (b'{"input": "data:image/jpeg,abc"}', 400, "must begin like data:image/jpeg;base64,"),
        (json.dumps({"input": ["eA=="] * 65}).encode(), 413, "more than 64 images"),
    ],
)
def test_json_that_holds_no_image_is_refused(client: TestClient, body: bytes, status: int, sentence: str) -> None:
    response = client.post("/embed", content=body, headers={"content-type": "application/json"})
    assert refusal(response)[0] == status
    assert sentence in refusal(response)[1]


def test_json_refuses_each_bad_text_in_its_place(client: TestClient) -> None:
    data = client.post("/embed", json={"input": [uri(HAT), 7, "http://x/y.jpg", "%%%"]}).json()["data"]
    assert [item["status"] for item in data] == ["ok", "error", "error", "error"]
    assert [item["error"]["param"] for item in data[1:]] == ["input[1]", "input[2]", "input[3]"]
    assert [item["error"]["code"] for item in data[1:]] == ["not_base64", "url", "not_base64"]


# Forms of answers


def test_arrays_say_which_images_failed(client: TestClient, engine: Engine) -> None:
    images = files(HAT, b"text", SHOES)
    npy = np.load(BytesIO(client.post("/embed", files=images, headers=NPY).content))
    npz = dict(np.load(BytesIO(client.post("/embed", files=images, headers=NPZ).content)))
    content = client.post("/embed", files=images, headers=SAFETENSORS).content
    tensors = load(content)
    assert np.isnan(npy).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_array_equal(npz["embedding"], npy)
    np.testing.assert_array_equal(tensors["embedding"], npy)
    np.testing.assert_allclose(npy[2], encoded(engine, SHOES, "embedding")["embedding"], atol=1e-5)
    assert json.loads(str(npz["errors"]))["1"]["param"] == "input[1]"
    assert npz["fingerprint"] == client.get("/model").json()["fingerprint"]


def test_safetensors_carry_the_fingerprint(client: TestClient, tmp_path: Any) -> None:
    path = tmp_path / "answer.safetensors"
    path.write_bytes(client.post("/embed", files=files(HAT), headers=SAFETENSORS).content)
    with safe_open(path, framework="np") as file:
        assert file.metadata()["fingerprint"] == client.get("/model").json()["fingerprint"]


def test_float16_and_unit_length(client: TestClient, engine: Engine) -> None:
    expected = encoded(engine, HAT, "embedding")["embedding"]
    half = np.load(BytesIO(client.post("/embed?dtype=float16", files=files(HAT), headers=NPY).content))
    np.testing.assert_array_equal(half[0], expected.astype(np.float16))
    text = client.post("/embed?dtype=float16", files=files(HAT)).json()["embedding"]
    np.testing.assert_array_equal(np.array(text, np.float16), expected.astype(np.float16))
    unit = np.array(client.post("/embed?normalize=true", files=files(HAT)).json()["embedding"])
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("query", "param"),
    [("dtype=int8", "dtype"), ("normalize=yes", "normalize"), ("normalise=true", "normalise"), ("top=3", "top")],
)
def test_options_that_do_not_exist_are_refused(client: TestClient, query: str, param: str) -> None:
    assert refusal(client.post(f"/embed?{query}", files=files(HAT)))[::2] == (400, param)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "application/json"),
        ("application/*", "application/json"),
        ("application/x-npz;q=0.9, application/json", "application/x-npz"),
        ("application/safetensors", "application/x-safetensors"),
    ],
)
def test_accept_chooses_the_form(client: TestClient, accept: str, kind: str) -> None:
    assert client.post("/embed", files=files(HAT), headers={"accept": accept}).headers["content-type"] == kind


def test_an_accept_that_nothing_satisfies_is_refused(client: TestClient) -> None:
    status, message, _ = refusal(client.post("/embed", files=files(HAT), headers={"accept": "image/png"}))
    assert status == 406
    assert "application/x-npy" in message


def test_classify_gives_all_probabilities_as_arrays(client: TestClient, engine: Engine) -> None:
    array = np.load(BytesIO(client.post("/classify", files=files(HAT, SHOES), headers=NPY).content))
    assert array.shape == (2, 3)
    np.testing.assert_allclose(array.sum(axis=1), 1, atol=1e-6)
    logits = encoded(engine, SHOES, "logits")["logits"]
    assert array[1].argmax() == logits.argmax()


# Features and scores


def test_features_as_maps_and_as_tokens(client: TestClient, engine: Engine) -> None:
    expected = encoded(engine, HAT, "stage2", "stage4")
    arrays = np.load(BytesIO(client.post("/features?stages=stage2,stage4", files=files(HAT)).content))
    assert arrays["stage2"].shape == (1, 16, 8, 8)
    for name in ("stage2", "stage4"):
        np.testing.assert_array_equal(arrays[name][0], expected[name])
    response = client.post("/features?stages=stage2&layout=tokens", files=files(HAT), headers=NPY)
    tokens = np.load(BytesIO(response.content))
    assert tokens.shape == (1, 64, 16)
    np.testing.assert_array_equal(tokens[0, 9], expected["stage2"][:, 1, 1])  # row by row
    text = client.post("/features", files=files(HAT), headers={"accept": "application/json"}).json()
    np.testing.assert_array_equal(np.array(text["stage4"], np.float32), expected["stage4"])


def test_features_refuse_what_they_cannot_give(client: TestClient) -> None:
    assert refusal(client.post("/features?stages=stage5", files=files(HAT)))[::2] == (400, "stages")
    assert refusal(client.post("/features?stages=stage1,stage2", files=files(HAT), headers=NPY))[0] == 406


def test_large_answers_count_as_held_memory(engine: Engine) -> None:
    with client_of(engine, max_held_bytes=20_000) as client:
        assert client.post("/embed", files=files(HAT)).status_code == 200
        response = client.post("/features?stages=stage1", files=files(HAT, HAT))
    assert refusal(response)[0] == 429
    assert "memory set aside for requests in progress is full" in refusal(response)[1]


def test_a_score_is_the_loss_of_pretraining_with_fixed_masks(client: TestClient, engine: Engine) -> None:
    golden = client.app.state.runtime.golden["reconstruct.image_b"][0]
    preprocessing = engine.bundle.description.preprocessing
    pixels = preprocess(HAT, preprocessing)
    expected = np.zeros((2, 2))
    for mask in scoring_masks(4, 2):
        inputs = {name: array[None] for name, array in reconstruct_inputs(pixels, golden, mask).items()}
        found = engine.run("reconstruct", inputs, ["reconstruction_a"])["reconstruction_a"][0]
        expected += unit_errors(normalize(pixels, preprocessing), found, True) * mask.reshape(2, 2) / 2
    body = client.post("/score?map=true", files=files(HAT)).json()
    np.testing.assert_allclose(body["map"], expected, rtol=1e-4)
    assert body["score"] == pytest.approx(expected.mean(), rel=1e-4)
    again = client.post("/score", files=files(SHOES, HAT)).json()["data"]
    assert again[1]["score"] == pytest.approx(body["score"], rel=1e-4)  # whatever stands beside it
    assert "map" not in again[1]


def test_unit_errors_agree_with_the_loss_of_pretraining(request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch")

    from mixmim_serve.model.checkpoint import load_checkpoint

    model, _ = load_checkpoint(request.getfixturevalue("small_checkpoint"))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, False]])
    with torch.inference_mode():
        loss = float(model.pretrain(pixels, mask).loss)
        found = model.reconstruct(pixels, pixels.flip(0), mask.expand(2, -1))
    hidden = mask.numpy().reshape(2, 2)
    errors = [
        unit_errors(pixels[row].numpy(), image[row].numpy(), True)[where]
        for image, where in ((found.image_a, hidden), (found.image_b.flip(0), ~hidden))
        for row in range(2)
    ]
    assert np.concatenate(errors).mean() == pytest.approx(loss, rel=1e-4)


def test_scoring_masks_hide_every_unit_as_often() -> None:
    masks = scoring_masks(49, 3)
    assert masks.shape == (6, 49)
    assert (masks.sum(axis=0) == 3).all()
    assert not np.array_equal(masks[0], masks[2])


# Streams


def lines_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_stream_of_lines_is_answered_in_order(client: TestClient, engine: Engine) -> None:
    names = [*PHOTOS] * 20
    body = "\n".join(json.dumps({"input": uri(PHOTOS[name].read_bytes()), "id": name}) for name in names)
    answers = lines_of(client.post("/embed/stream?normalize=true", content=body, headers=NDJSON))
    assert [(answer["index"], answer["id"]) for answer in answers] == list(enumerate(names))
    for answer in answers[:3]:
        expected = encoded(engine, PHOTOS[answer["id"]].read_bytes(), "embedding")["embedding"]
        np.testing.assert_allclose(answer["embedding"], expected / np.linalg.norm(expected), atol=1e-5)


def test_a_stream_goes_on_behind_what_is_bad(client: TestClient) -> None:
    lines = [json.dumps({"input": uri(image)}) for image in (HAT, HAT[:900], SHOES)]
    body = "\n".join([lines[0], "no json", lines[1], '{"photo": 1}', "", '{"input": "http://x/y"}', lines[2]])
    answers = lines_of(client.post("/embed/stream", content=body, headers=NDJSON))
    assert [answer["status"] for answer in answers] == ["ok", "error", "error", "error", "error", "ok"]
    codes = [answer["error"]["code"] for answer in answers[1:5]]
    assert codes == ["malformed_json", "undecodable_image", "malformed_json", "url"]
    assert [answer["error"]["param"] for answer in answers[1:5]] == [f"input[{index}]" for index in range(1, 5)]


def test_a_form_may_be_a_stream_of_any_length(client: TestClient) -> None:
    answers = lines_of(client.post("/embed/stream", files=files(*[HAT, SHOES] * 60)))
    assert [answer["status"] for answer in answers] == ["ok"] * 120
    alone = client.post("/embed", files=files(SHOES)).json()["embedding"]
    np.testing.assert_allclose(answers[-1]["embedding"], alone, atol=1e-5)


def test_a_stream_that_breaks_off_says_so_last(client: TestClient, engine: Engine) -> None:
    form = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + HAT + b"\r\n"
    answers = lines_of(client.post("/embed/stream", content=part + part, headers=form))
    assert [answer["status"] for answer in answers] == ["ok", "broken_off"]
    assert answers[-1]["error"]["code"] == "malformed_form"
    with client_of(engine, max_image_bytes=10_000) as small:
        answers = lines_of(small.post("/embed/stream", content=b"x" * 20_000, headers=NDJSON))
        assert [(answer["status"], answer["error"]["code"]) for answer in answers] == [("broken_off", "line_too_long")]


def test_a_stream_is_larger_than_a_body_may_be(engine: Engine) -> None:
    line = json.dumps({"input": uri(HAT)}).encode() + b"\n"

    def body() -> Iterator[bytes]:
        for _ in range(40):
            yield line

    with client_of(engine, max_body_bytes=3 * len(line), stream_window=4) as client:
        assert len(lines_of(client.post("/embed/stream", content=body(), headers=NDJSON))) == 40


def test_streams_refuse_other_bodies_and_methods(client: TestClient) -> None:
    assert refusal(client.post("/embed/stream", content=HAT, headers=JPEG))[0] == 415
    assert refusal(client.post("/embed/stream?top=1", content=b"", headers=NDJSON))[0] == 400
    assert refusal(client.get("/embed/stream"))[0] == 405


# OpenAI


def test_openai_embeddings_as_floats_and_base64(client: TestClient, engine: Engine) -> None:
    expected = encoded(engine, HAT, "embedding")["embedding"]
    asked = {"model": MODEL, "input": [uri(HAT)], "encoding_format": "float"}
    body = client.post("/v1/embeddings", json=asked).json()
    assert body.keys() == {"object", "data", "usage"} | IDENTITY
    assert (body["object"], body["data"][0]["object"], body["data"][0]["index"]) == ("list", "embedding", 0)
    np.testing.assert_array_equal(np.array(body["data"][0]["embedding"], np.float32), expected)
    body = client.post("/v1/embeddings", json=asked | {"encoding_format": "base64", "input": uri(HAT)}).json()
    found = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(found, expected)
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"model": None}, 404, "model"),
        ({"dimensions": 12}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"temperature": 1}, 400, "temperature"),
        ({"input": "a photo of a hat"}, 400, "input[0]"),
        ({"input": [uri(HAT), uri(HAT[:900])]}, 422, "input[1]"),
        ({"input": None}, 400, "input"),
    ],
)
def test_openai_refusals(client: TestClient, change: dict[str, Any], status: int, param: str) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": uri(HAT)} | change)
    assert refusal(response)[::2] == (status, param)


def test_openai_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [(model["id"], model["object"]) for model in listed["data"]] == [(MODEL, "model")]
    assert client.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert refusal(client.get("/v1/models/gpt"))[0] == 404


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(3,), (20_000,), (32, 32, 32), (2, 100, 100), (3, 2, 9000), (0, 9000)])
def test_large_arrays_are_written_in_pieces_to_the_same_bytes(shape: tuple[int, ...], dtype: type[Any]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    value = {"status": "ok", "stage1": array, "label": 'a "b"', "scores": array.ravel()[:5]}
    assert json_bytes(value) == orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
