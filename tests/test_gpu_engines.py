"""Engines on a real GPU against torch in float32; run with `make gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from numpy.typing import NDArray

from benchmarks.engines_gpu import full_bundle, runtimes_here
from mixmim_serve.bundle import CACHE, DEFAULT_BUNDLE, WEIGHTS, Bundle
from mixmim_serve.engines import Engine, hardware, open_engine
from mixmim_serve.engines.certificate import TOLERANCES, agreement, certify
from mixmim_serve.engines.cuda import CudaStream, DeviceMemory, pinned
from mixmim_serve.engines.onnx import CUDA, OnnxEngine
from mixmim_serve.engines.tensorrt import TensorRtEngine, TensorRtRtxEngine
from mixmim_serve.errors import EngineError
from mixmim_serve.preprocess import preprocess

pytestmark = pytest.mark.gpu
BUILT = {"tensorrt": TensorRtEngine, "tensorrt-rtx": TensorRtRtxEngine}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model with engines of every TensorRT here."""
    return full_bundle(DEFAULT_BUNDLE / WEIGHTS, tmp_path_factory.mktemp("gpu") / "tiny", runtimes_here())


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> NDArray[np.uint8]:
    """40 different ones."""
    paths = sorted((REPOSITORY / "examples").glob("*.jpg"))
    pixels = [preprocess(path.read_bytes(), bundle.description.preprocessing) for path in paths]
    return np.stack([np.roll(pixels[n % len(paths)], 3 * n, axis=1) for n in range(40)])


@pytest.fixture(params=BUILT)
def kind(request: pytest.FixtureRequest, bundle: Bundle) -> str:
    if not any(built.runtime == request.param for built in bundle.built):
        pytest.skip(f"{request.param} is not installed, or does not know this GPU")
    return str(request.param)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tensorrt_gives_torchs_numbers_on_both_graphs(bundle: Bundle, kind: str, precision: str) -> None:
    engine = open_engine(bundle, kind, precision)
    found = certify(engine)
    found.require()
    assert found.outputs.keys() > {"encoder.embedding", "reconstruct.reconstruction_b"}
    assert "sm" in engine.hardware


def test_cuda_graphs_change_nothing(
    bundle: Bundle, kind: str, images: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    replayed, plain = (BUILT[kind](bundle, "fp16", cuda_graphs=graphs) for graphs in (True, False))
    for count in (1, 3, 8, 32, 5, 1, 32):
        one, two = (
            each.run("encoder", {"pixels": images[:count]}, ["embedding", "stage2"]) for each in (replayed, plain)
        )
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name])
    assert "without a CUDA graph" not in caplog.text


def check_batches(engine: Engine, images: NDArray[np.uint8]) -> None:
    """Every size, in an order that reuses buffers, from two threads: rows are those of the image."""
    expected = open_engine(engine.bundle, "torch", "fp32").run("encoder", {"pixels": images}, ["embedding"])[
        "embedding"
    ]

    def embed(count: int) -> tuple[int, NDArray[np.float32]]:
        first = count % (len(images) - count + 1)
        return first, engine.run("encoder", {"pixels": images[first : first + count]}, ["embedding"])["embedding"]

    with ThreadPoolExecutor(2) as pool:
        for first, found in pool.map(embed, [*range(1, 33), 32, 1, 7]):
            assert agreement(found, expected[first : first + len(found)]).within(TOLERANCES[engine.precision])


def test_tensorrt_runs_any_batch_up_to_its_profile(bundle: Bundle, kind: str, images: NDArray[np.uint8]) -> None:
    engine = open_engine(bundle, kind)
    check_batches(engine, images)
    with pytest.raises(EngineError, match="was compiled for batches of at most 32, got 40"):
        engine.run("encoder", {"pixels": images}, ["embedding"])


def test_tensorrt_rtx_keeps_what_it_compiled(bundle: Bundle, images: NDArray[np.uint8]) -> None:
    if not any(built.runtime == "tensorrt-rtx" for built in bundle.built):
        pytest.skip("TensorRT-RTX is not installed, or does not know this GPU")
    TensorRtRtxEngine(bundle).run("encoder", {"pixels": images[:2]}, ["embedding"])
    assert list((bundle.path / CACHE).glob(f"encoder.*.{hardware.gpu()}.cache"))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_onnx_runtime_runs_on_the_gpu(bundle: Bundle, precision: str, images: NDArray[np.uint8]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this is onnxruntime, not onnxruntime-gpu")
    engine = open_engine(bundle, "onnx", precision)
    assert (engine.name, engine.precision) == ("onnx-cuda", precision)
    assert isinstance(engine, OnnxEngine)
    certify(engine).require()
    check_batches(engine, images)
    many = engine.run("encoder", {"pixels": images}, ["embedding"])["embedding"]  # in pieces
    assert len(many) == 40


def test_auto_takes_an_engine_on_the_gpu(bundle: Bundle) -> None:
    assert open_engine(bundle).name.endswith("-cuda")


def test_a_stream_copies_and_a_capture_that_fails_leaves_it_usable(tmp_path: Path) -> None:
    stream, memory = CudaStream(), DeviceMemory(1 << 20)
    source, target = (pinned((1 << 18,), np.dtype(np.float32)) for _ in range(2))
    source[:], target[:] = np.arange(1 << 18), 0

    def not_allowed() -> None:
        stream.wait()  # while a graph is captured

    with pytest.raises(EngineError, match="CUDA failed"):
        stream.capture(not_allowed)
    graph = stream.capture(lambda: stream.upload(source, memory))
    stream.launch(graph)
    stream.download(memory, target)
    stream.wait()
    np.testing.assert_array_equal(source, target)


def test_memory_of_the_gpu_is_known() -> None:
    used = hardware.gpu_memory_used()
    assert used is not None
    assert used > 0
