"""Batches of fixed sizes: what the runtime is asked for, what comes back, and what size and company do to numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from numpy.typing import NDArray

from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines.buckets import BUCKETS, bucket_of, buckets_between, padded, run_in_buckets
from mixmim_serve.engines.onnx import BoundSession, OnnxEngine

TINY = REPOSITORY / "mixmim_serve" / "bundles" / "tiny"


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [1]), (2, [2]), (3, [4]), (8, [8]), (9, [16]), (31, [32]), (32, [32]), (33, [32, 1]), (75, [32, 32, 16])],
)
def test_a_batch_is_padded_to_its_bucket_and_cut_back(count: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert all(array.flags.c_contiguous for array in inputs.values())
        seen.append(len(inputs["a"]))
        last = min(32, count - 32 * (len(seen) - 1))  # rows of this piece that are not padding
        assert (inputs["a"][last:] == inputs["a"][last - 1]).all()
        return {"sum": inputs["a"] + inputs["b"], "rows": np.arange(len(inputs["a"]))}

    a, b = np.arange(count * 2).reshape(count, 2), np.arange(count * 4).reshape(count, 4)[:, ::2]
    results = run_in_buckets(run, {"a": a, "b": b})
    assert seen == sizes
    np.testing.assert_array_equal(results["sum"], a + b)
    assert len(results["rows"]) == count


def test_a_batch_of_a_buckets_size_is_not_copied() -> None:
    array = np.zeros((4, 3))
    assert padded(array, 4) is array


@pytest.mark.parametrize(
    ("ends", "buckets"),
    [((1, 32), BUCKETS), ((1, 1), (1,)), ((4, 24), (4, 8, 16, 24)), ((3, 6), (3, 4, 6)), ((8, 8), (8,))],
)
def test_buckets_between_two_batches(ends: tuple[int, int], buckets: tuple[int, ...]) -> None:
    assert buckets_between(*ends) == buckets
    for count in range(1, ends[1] + 1):
        assert count <= bucket_of(count, buckets) <= max(2 * count, ends[0])


def pixels(engine: Engine, count: int) -> NDArray[np.uint8]:
    size = engine.bundle.arch.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize(("kind", "precision", "apart"), [("onnx", "fp32", 2e-6), ("openvino", "fp32", 2e-6)])
def test_an_embedding_depends_on_the_size_of_its_batch_alone(kind: str, precision: str, apart: float) -> None:
    """Not on its neighbours or its row, to the last bit; and on the size by rounding only."""
    engine = open_engine(TINY, kind, precision)
    images = pixels(engine, 20)

    def embed(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        return engine.run("encoder", {"pixels": batch}, ["embedding"])["embedding"]

    alone = embed(images[:1])[0]
    for size in (1, 2, 3, 5, 8):
        found = []
        for row, first in ((0, 1), (size - 1, 1), (size // 2, 11)):
            batch = images[first : first + size].copy()
            batch[row] = images[0]
            found.append(embed(batch)[row])
        assert all((each == found[0]).all() for each in found), size
        assert np.abs(found[0] - alone).max() <= apart * np.abs(alone).max()


def outputs_of(engine: Engine, graph: str, order: Sequence[int]) -> list[str]:
    return [engine.bundle.graphs[graph][index] for index in order]


def test_bound_memory_gives_what_a_plain_run_gives(engine: OnnxEngine) -> None:
    """The path of CUDA devices, with a CPU's memory."""
    bound = BoundSession(engine._session("encoder"), "cpu")
    images = pixels(engine, 10)
    first = bound.run({"pixels": images[:4]}, ["embedding"])["embedding"]
    kept = first.copy()
    for start, size, order in ((4, 4, [0]), (2, 2, [3, 0]), (0, 8, [2, 5, 1]), (6, 4, [4, 3, 2, 1, 0])):
        names, batch = outputs_of(engine, "encoder", order), images[start : start + size]
        results, plain = bound.run({"pixels": batch}, names), engine.run("encoder", {"pixels": batch}, names)
        assert list(results) == names
        for name in names:
            np.testing.assert_array_equal(results[name], plain[name])
    np.testing.assert_array_equal(first, kept)  # an answer is not overwritten by the next one
    assert {size for name, size in bound.values if name == "pixels"} == {2, 4, 8}


def test_an_engine_on_a_device_runs_in_buckets(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = pixels(engine, 37), np.zeros((37, engine.bundle.arch.units), np.bool_)
    masks[:, 0] = True
    inputs = {"image_a": images, "image_b": images[::-1], "from_partner": masks}
    expected = engine.run("reconstruct", inputs, ["reconstruction_b", "mixed"])
    sizes: list[int] = []

    class OnCpu(BoundSession):
        def __init__(self, session: Any, device: str) -> None:
            super().__init__(session, "cpu")
            assert device == "cuda"

        def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
            sizes.append(len(inputs["image_a"]))
            return super().run(inputs, outputs)

    monkeypatch.setattr("mixmim_serve.engines.onnx.BoundSession", OnCpu)
    monkeypatch.setattr(engine, "device", "cuda")
    results = engine.run("reconstruct", inputs, ["reconstruction_b", "mixed"])
    assert sizes == [32, 8]
    for name, array in results.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
