"""POST /anomaly and the client's call: what they answer, refuse and count."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from anomalies import calibrated_bundle, normal_photos, write_photos  # noqa: F401 - fixtures
from PIL import Image
from safetensors.numpy import load
from serving import HAT, IDENTITY, JPEG, NPZ, Around, TestClient, client_of, files, refusal, url_of

from mixmim_serve.anomaly.detector import Verdict, open_detector
from mixmim_serve.anomaly.photos import run_photos
from mixmim_serve.client import AsyncClient, Client
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import ConfigError, RefusedError
from mixmim_serve.service.settings import Settings
from mixmim_serve.sources import open_source

PNG = {"accept": "image/png"}


@pytest.fixture(scope="module")
def calibrated(calibrated_bundle: Path) -> Engine:  # noqa: F811
    return open_engine(calibrated_bundle, "onnx", threads=1)


@pytest.fixture(scope="module")
def client(calibrated: Engine) -> Iterator[TestClient]:
    with client_of(calibrated) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two normal photos and two odd ones."""
    folder = write_photos(tmp_path_factory.mktemp("photos"), 2, seed=9)
    for path in sorted(write_photos(folder / "odd", 2, odd=True).iterdir()):
        path.rename(folder / f"odd{path.name}")
    (folder / "odd").rmdir()
    return folder


@pytest.fixture(scope="module")
def verdicts(calibrated: Engine, folder: Path) -> list[Verdict]:
    detector = open_detector(calibrated)
    (group,) = run_photos(calibrated, open_source(folder), detector.outputs)
    return detector.verdicts(group.outputs)


@pytest.fixture(scope="module")
def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_each_image_gets_what_the_detector_says(
    client: TestClient, images: list[bytes], verdicts: list[Verdict]
) -> None:
    body = client.post("/anomaly?map=true", files=files(*images)).json()
    assert body.keys() == {"data"} | IDENTITY
    for entry, verdict in zip(body["data"], verdicts, strict=True):
        assert entry["score"] == pytest.approx(float(verdict.score), rel=1e-3)
        assert entry["percentile"] == pytest.approx(float(verdict.percentile))
        assert entry["threshold"] == pytest.approx(verdict.threshold)
        assert entry["normal"] is (entry["score"] <= entry["threshold"])
        np.testing.assert_allclose(entry["map"], verdict.places, rtol=1e-3)
    assert [entry["normal"] for entry in body["data"]][2:] == [False, False]


def test_one_image_in_every_form_is_flat(client: TestClient, images: list[bytes]) -> None:
    text = base64.b64encode(images[2]).decode()
    found = [
        client.post("/anomaly", files=files(images[2])).json(),
        client.post("/anomaly", content=images[2], headers={"content-type": "image/png"}).json(),
        client.post("/anomaly", json={"input": text}).json(),
        client.post("/anomaly", json={"input": f"data:image/png;base64,{text}"}).json(),
    ]
    assert found[0].keys() == {"score", "percentile", "normal", "threshold"} | IDENTITY
    assert found == [found[0]] * 4


def test_arrays_have_a_row_per_image_and_nan_for_bad_ones(client: TestClient, images: list[bytes]) -> None:
    response = client.post("/anomaly?map=true", files=files(images[0], b"text", images[2]), headers=NPZ)
    arrays = dict(np.load(BytesIO(response.content), allow_pickle=False))
    assert arrays.keys() == {"score", "percentile", "normal", "threshold", "map", "errors"} | IDENTITY
    assert arrays["map"].shape == (3, 2, 2)
    assert np.isnan(arrays["score"]).tolist() == [False, True, False]
    assert arrays["normal"][2] == 0
    stored = client.post("/anomaly", files=files(images[0]), headers={"accept": "application/safetensors"})
    np.testing.assert_allclose(load(stored.content)["score"], arrays["score"][:1], rtol=1e-3)


def test_overlays_are_pictures(client: TestClient, images: list[bytes]) -> None:
    body = client.post("/anomaly?overlay=true", files=files(images[2])).json()
    kind, _, text = body["overlay"].partition(",")
    assert kind == "data:image/png;base64"
    alone = client.post("/anomaly", files=files(images[2]), headers=PNG)
    assert alone.headers["content-type"] == "image/png"
    assert alone.content == base64.b64decode(text)
    with Image.open(BytesIO(alone.content)) as picture:
        assert (picture.format, picture.size) == ("PNG", (256, 256))
    normal = client.post("/anomaly", files=files(images[0]), headers=PNG)
    assert normal.content != alone.content


def test_a_bad_image_does_not_harm_those_beside_it(client: TestClient, images: list[bytes]) -> None:
    response = client.post("/anomaly", files=files(HAT[:900], images[0], b"text"))
    assert response.status_code == 200
    data = response.json()["data"]
    assert [entry["status"] for entry in data] == ["error", "ok", "error"]
    assert data[2]["error"]["param"] == "input[2]"
    assert refusal(client.post("/anomaly", files=files(HAT[:900])))[::2] == (422, "input[0]")
    assert refusal(client.post("/anomaly", content=HAT[:900], headers=JPEG | PNG))[::2] == (422, "input[0]")
    assert client.post("/anomaly", files=files(HAT[:900], b"text")).status_code == 422


def test_the_network_runs_once_for_embedding_and_patches(calibrated: Engine, images: list[bytes]) -> None:
    around = Around(calibrated, list)
    with client_of(around) as client:
        around.ran.clear()
        client.post("/anomaly", files=files(images[0]))
    assert around.ran == [("encoder", list(open_detector(calibrated).outputs))]


def test_what_a_request_cannot_have_is_refused(client: TestClient, images: list[bytes]) -> None:
    assert refusal(client.post("/anomaly?masks=2", files=files(images[0])))[0] == 400
    assert refusal(client.post("/anomaly?overlay=yes", files=files(images[0])))[::2] == (400, "overlay")
    status, message, param = refusal(client.post("/anomaly?overlay=true", files=files(images[0]), headers=NPZ))
    assert (status, param) == (400, "overlay")
    assert "accept application/json or image/png" in message
    status, message, _ = refusal(client.post("/anomaly", files=files(*images[:2]), headers=PNG))
    assert (status, message) == (400, "got 2 images, but a PNG shows one: accept JSON.")
    assert refusal(client.post("/anomaly", files=files(images[0]), headers={"accept": "application/x-npy"}))[0] == 406


def test_a_bundle_that_is_not_calibrated_answers_404(engine: Engine) -> None:
    with client_of(engine) as client:
        status, message, _ = refusal(client.post("/anomaly", files=files(HAT)))
        assert client.get("/model").json()["anomaly"] is None
    assert status == 404
    assert message.startswith("this bundle is not calibrated: run mixmim calibrate BUNDLE NORMAL_PHOTOS")


def test_the_operator_sets_the_rate(calibrated: Engine, images: list[bytes]) -> None:
    with client_of(calibrated, false_alarm_rate=0.4) as client:
        loose = client.post("/anomaly", files=files(images[0])).json()
        about = client.get("/model").json()["anomaly"]
    assert about["false_alarm_rate"] == 0.4
    assert loose["threshold"] == about["threshold"] == pytest.approx(open_detector(calibrated, 0.4).threshold)
    assert about["threshold"] < open_detector(calibrated).threshold
    assert (about["photos"], about["engine"]) == (60, "onnx-cpu fp32")


@pytest.mark.parametrize("rate", [-0.1, 0.6, float("nan"), "much"])
def test_a_setting_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"false.alarm.rate must be"):
        Settings(false_alarm_rate=rate)
    assert Settings(false_alarm_rate=0).false_alarm_rate == 0  # as calibrated


def test_verdicts_are_counted(calibrated: Engine, images: list[bytes]) -> None:
    with client_of(calibrated) as client:
        client.post("/anomaly", files=files(images[2], b"text", images[3]))
        client.post("/anomaly", files=files(images[2]), headers=PNG)
        text = client.get("/metrics").text
    assert 'mixmim_anomaly_images_total{verdict="abnormal"} 3.0' in text
    assert 'mixmim_requests_total{route="/anomaly",status="200"} 2.0' in text


def test_both_clients_ask(calibrated: Engine, engine: Engine, images: list[bytes]) -> None:
    async def ask(url: str) -> list[object]:
        async with AsyncClient(url) as client:
            found = await client.anomaly(images[2], with_map=True, overlay=True)
            return [found.score, found.map.tolist(), found.overlay]

    with url_of(calibrated) as (url, _), Client(url) as client:
        found = client.anomaly(images[2], with_map=True, overlay=True)
        plain = client.anomaly(images[2])
        assert asyncio.run(ask(url)) == [found.score, found.map.tolist(), found.overlay]
    assert (found.normal, found.percentile, found.map.shape, found.map.dtype) == (False, 100, (2, 2), np.float32)
    assert found.score > found.threshold
    assert found.overlay.startswith(b"\x89PNG")
    assert (plain.score, plain.map, plain.overlay) == (found.score, None, None)
    with url_of(engine) as (url, _), Client(url) as client, pytest.raises(RefusedError, match="is not calibrated"):
        client.anomaly(HAT)


def test_a_score_of_a_calibrated_bundle_has_a_percentile(
    calibrated: Engine, engine: Engine, client: TestClient, images: list[bytes]
) -> None:
    found = client.post("/score", files=files(images[0], images[2])).json()["data"]
    assert all(0 <= entry["percentile"] <= 100 for entry in found)
    quantiles = open_detector(calibrated).calibration.reconstruction
    expected = np.interp(found[0]["score"], quantiles, np.linspace(0, 100, 101))
    assert found[0]["percentile"] == pytest.approx(expected, abs=1e-3)
    assert "percentile" not in client.post("/score?masks=3", files=files(images[0])).json()
    with url_of(calibrated) as (url, _), Client(url) as ours:
        assert ours.score(images[0]).percentile == pytest.approx(expected, abs=1e-3)
        assert ours.score(images[0], masks=1).percentile is None
    with client_of(engine) as other:
        assert "percentile" not in other.post("/score", files=files(images[0])).json()
