"""Numbers that are none: inf or NaN from the model, and what float16 cannot hold, are errors of their image."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import HAT, NPZ, SHOES, Around, app_of, client_of, files, refusal

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.preprocess import preprocess


class Spoiling(Around):
    """Multiplies the outputs for SHOES by a factor; the other images of a batch keep theirs."""

    def __init__(self, engine: Engine, factor: float) -> None:
        super().__init__(engine, list)
        self.factor = factor
        self.spoilt = preprocess(SHOES, engine.bundle.description.preprocessing)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        results = {name: array.copy() for name, array in super().run(graph, inputs, outputs).items()}
        for row, pixels in enumerate(inputs.get("pixels", inputs.get("image_a", ()))):
            if np.array_equal(pixels, self.spoilt):
                for array in results.values():
                    array[row] *= self.factor
        return results


@pytest.mark.parametrize("factor", [np.inf, np.nan])
def test_what_is_not_finite_is_an_error_of_its_image(engine: Engine, factor: float) -> None:
    with client_of(Spoiling(engine, factor)) as client:
        for path in ("/embed", "/embed?normalize=true", "/classify", "/score", "/features"):
            answer = client.post(path, files=files(HAT, SHOES), headers={"accept": "application/json"}).json()
            good, bad = answer["data"]
            assert (good["status"], bad["status"], bad["error"]["code"]) == ("ok", "error", "not_finite"), path
            assert bad["error"]["param"] == "input[1]"
            status, message, param = refusal(client.post(path, files=files(SHOES)))
            assert (status, param) == (422, "input[0]")
            assert "has inf or NaN: send another image" in message
        arrays = np.load(BytesIO(client.post("/embed", files=files(HAT, SHOES), headers=NPZ).content))
        assert np.isnan(arrays["embedding"]).all(axis=1).tolist() == [False, True]
        assert json.loads(str(arrays["errors"]))["1"]["code"] == "not_finite"
        assert refusal(client.post("/reconstruct", files=files(SHOES, HAT)))[0] == 422
        lines = [json.loads(line) for line in client.post("/embed/stream", files=files(HAT, SHOES)).text.splitlines()]
        assert [line["status"] for line in lines] == ["ok", "error"]
        assert 'mixmim_failures_total{reason="not_finite"}' in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/embed", "/features?stages=stage4"])
def test_what_float16_cannot_hold_is_an_error_that_names_float32(engine: Engine, path: str) -> None:
    half = f"{path}{'&' if '?' in path else '?'}dtype=float16"
    with client_of(Spoiling(engine, 1e6)) as client:
        for accept in ("application/json", "application/x-npz"):
            headers = {"accept": accept}
            assert client.post(path, files=files(SHOES), headers=headers).status_code == 200
            status, message, param = refusal(client.post(half, files=files(SHOES), headers=headers))
            assert (status, param) == (422, "input[0]")
            assert message.endswith("which float16 cannot hold: ask for dtype=float32.")
        good, bad = client.post(half, files=files(HAT, SHOES), headers={"accept": "application/json"}).json()["data"]
        assert (good["status"], bad["error"]["code"]) == ("ok", "not_finite")
        assert client.post("/embed?dtype=float16&normalize=true", files=files(SHOES)).status_code == 200


def test_a_canary_that_is_not_finite_is_wrong(engine: Engine) -> None:
    spoiling = Spoiling(engine, np.nan)
    runtime = app_of(spoiling).state.runtime
    spoiling.spoilt = runtime.golden["encoder.pixels"][0]
    assert not asyncio.run(runtime.is_healthy())
    assert runtime.is_wrong
    runtime.close()
