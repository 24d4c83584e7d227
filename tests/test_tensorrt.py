"""Engines that TensorRT built: which of them can run here, in sentences, and how batches go through one.

Refusals meet the real TensorRT-RTX. The rest runs on `fake_cuda`, which keeps CUDA's and TensorRT's rules; the real
ones run in tests/test_gpu.py.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from exporting import ENCODER_ONLY, assert_engines_are_whole, write_checkpoint
from fake_cuda import FakeCuda, FakeTensorRt, is_pinned
from numpy.typing import NDArray

from export.build import Options, export_bundle
from export.tensorrt import EngineOptions
from mixmim_serve.bundle import CACHE, Bundle, CompiledEngine, open_bundle
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.engines import tensorrt as tensorrt_engine
from mixmim_serve.engines.certificate import certify
from mixmim_serve.engines.tensorrt import TensorRtEngine, TensorRtRtxEngine, choose
from mixmim_serve.errors import BundleError, EngineError
from mixmim_serve.extract.pipeline import run_files
from mixmim_serve.service.batcher import Batcher
from mixmim_serve.service.runtime import Runtime

VERSION = FakeTensorRt.__version__
GPU = "sm89"


def built(graph: str, precision: str = "fp16", runtime: str = "tensorrt-rtx", **changes: object) -> CompiledEngine:
    file = f"{graph}.{precision}.{runtime}.engine"
    values = {"version": VERSION, "hardware": "sm80+sm89", "batches": (1, 4, 8)} | changes
    return CompiledEngine(file, graph, precision, runtime, **values)  # type: ignore[arg-type]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr("mixmim_serve.engines.cuda.runtime", lambda: fake)
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu", lambda: GPU)
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu_name", lambda: "NVIDIA Fake (sm89)")
    return fake


@pytest.fixture
def trt(cuda: FakeCuda, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = FakeTensorRt(cuda, engine, (1, 8))
    monkeypatch.setattr(tensorrt_engine, "load", lambda runtime: fake)
    return fake


@pytest.fixture
def bundle(bundle_copy: Path) -> Bundle:
    """With plans for the fake of both graphs and both runtimes."""
    plans = [
        built(graph, runtime=runtime)
        for runtime in ("tensorrt", "tensorrt-rtx")
        for graph in ("encoder", "reconstruct")
    ]
    for plan in plans:
        (bundle_copy / plan.file).write_text(plan.graph)
    return dataclasses.replace(open_bundle(bundle_copy), built=tuple(plans))


def images(engine: Engine, count: int, seed: int = 0) -> NDArray[np.uint8]:
    size = engine.bundle.arch.image_size
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize("kind", [TensorRtEngine, TensorRtRtxEngine])
@pytest.mark.parametrize("graphs", [True, False])
def test_batches_of_any_size_and_order_give_the_right_rows(
    trt: FakeTensorRt, bundle: Bundle, engine: Engine, kind: type[TensorRtEngine], graphs: bool
) -> None:
    ours = kind(bundle, cuda_graphs=graphs)
    kept = []
    for number, count in enumerate((3, 8, 1, 5, 3, 2, 8, 1)):
        batch = images(engine, count, number)
        names = [("embedding",), ("stage4", "logits"), ("logits", "embedding", "stage1")][number % 3]
        expected = engine.run("encoder", {"pixels": batch}, names)
        results = ours.run("encoder", {"pixels": batch}, names)
        assert list(results) == list(names)
        for name in names:
            assert results[name].dtype == np.float32
            np.testing.assert_allclose(results[name], expected[name], atol=1e-5)
            kept.append((results[name], results[name].copy()))
    for array, copy in kept:  # answers stay as they were when others came
        np.testing.assert_array_equal(array, copy)
    assert set(trt.ran) == {1, 2, 4, 8}
    assert len(trt.contexts) == 4  # one a bucket
    assert trt.cuda.launches == (8 if graphs else 0)


def test_the_reconstruct_graph_has_inputs_of_two_types(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    ours = TensorRtEngine(bundle)
    masks = np.random.default_rng(0).random((3, engine.bundle.arch.units)) < 0.5
    inputs = {"image_a": images(engine, 3), "image_b": images(engine, 3, 1)[::-1], "from_partner": masks}
    names = ["reconstruction_b", "mixed"]
    results, expected = ours.run("reconstruct", inputs, names), engine.run("reconstruct", inputs, names)
    for name in names:
        np.testing.assert_allclose(results[name], expected[name], atol=1e-5)
    assert certify(ours).holds
    assert (ours.name, ours.precision, ours.version) == ("tensorrt-cuda", "fp16", VERSION)
    assert ours.hardware == "NVIDIA Fake (sm89)"


def test_only_outputs_that_are_asked_for_come_back(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    ours = TensorRtEngine(bundle)
    result = ours.run("encoder", {"pixels": images(engine, 2)}, ["embedding"])["embedding"]
    assert not is_pinned(trt.cuda, result)  # which the next call overwrites
    assert len(trt.cuda.host) == 2  # the input, the embedding
    ours.run("encoder", {"pixels": images(engine, 2)}, ["embedding", "stage1"])
    assert len(trt.cuda.host) == 3


def test_memory_goes_with_the_engine(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    ours = TensorRtEngine(bundle)
    ours.run("encoder", {"pixels": images(engine, 3)}, ["embedding"])
    assert trt.cuda.device
    del ours
    trt.contexts.clear()
    gc.collect()
    assert not trt.cuda.device
    assert not trt.cuda.host


def test_a_profile_that_starts_above_one_is_padded_up_to(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    trt.batches = (4, 6)
    plans = tuple(dataclasses.replace(plan, batches=(4, 4, 6)) for plan in bundle.built)
    ours = TensorRtEngine(dataclasses.replace(bundle, built=plans))
    batch = images(engine, 5)
    for count in (5, 1):
        result = ours.run("encoder", {"pixels": batch[:count]}, ["embedding"])["embedding"]
        expected = engine.run("encoder", {"pixels": batch[:count]}, ["embedding"])["embedding"]
        np.testing.assert_allclose(result, expected, atol=1e-5)
        assert (trt.given["pixels"][count:] == batch[count - 1]).all()
    assert set(trt.ran) == {4, 6}


def test_a_batch_above_the_profile_is_refused(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    ours = TensorRtEngine(bundle)
    assert ours.max_batch == 8
    with pytest.raises(EngineError, match="was compiled for batches of at most 8, got 9: pass fewer rows, or export"):
        ours.run("encoder", {"pixels": images(engine, 9)}, ["embedding"])


@pytest.mark.usefixtures("trt")
def test_nobody_sends_more_than_the_profile_takes(bundle: Bundle, engine: Engine, tmp_path: Path) -> None:
    ours = TensorRtEngine(bundle)
    paths = [REPOSITORY / "examples" / name for name in ("hat.jpg", "shoes.jpg", "shirt.jpg")] * 4
    found, expected = (list(run_files(each, paths, ["embedding"])) for each in (ours, engine))
    assert [result.path for result in found] == paths
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.outputs["embedding"], other.outputs["embedding"], atol=1e-5)
    with ThreadPoolExecutor(1) as thread:
        assert Batcher(ours, "encoder", thread).max_batch == 8
        assert Batcher(ours, "encoder", thread, max_batch=4).max_batch == 4
        assert Batcher(engine, "encoder", thread).max_batch == 32


def test_a_server_is_ready_when_every_bucket_is(trt: FakeTensorRt, bundle: Bundle) -> None:
    runtime = Runtime(TensorRtEngine(bundle))
    trt.ran.clear()
    runtime.warm_up()
    runtime.close()
    assert set(trt.ran) == {1, 2, 4, 8}


@pytest.mark.parametrize("kind", [TensorRtEngine, TensorRtRtxEngine])
def test_what_cannot_be_captured_runs_all_the_same(
    trt: FakeTensorRt, bundle: Bundle, engine: Engine, kind: type[TensorRtEngine], caplog: pytest.LogCaptureFixture
) -> None:
    if kind is TensorRtEngine:
        trt.cuda.capture_fails = True
    else:
        trt.capturable = False
    batch = images(engine, 3)
    result = kind(bundle).run("encoder", {"pixels": batch}, ["embedding"])["embedding"]
    np.testing.assert_allclose(result, engine.run("encoder", {"pixels": batch}, ["embedding"])["embedding"], atol=1e-5)
    assert trt.cuda.launches == 0
    assert "runs without a CUDA graph in batches of 4: " in caplog.text


def test_compiled_kernels_are_kept_in_the_bundle(trt: FakeTensorRt, bundle: Bundle, engine: Engine) -> None:
    TensorRtEngine(bundle).run("encoder", {"pixels": images(engine, 1)}, ["embedding"])
    assert not (bundle.path / CACHE).exists()  # TensorRT's plans are compiled already
    ours = TensorRtRtxEngine(bundle)
    for count in (1, 3):
        ours.run("encoder", {"pixels": images(engine, count)}, ["embedding"])
    (path,) = (bundle.path / CACHE).iterdir()
    assert path.name == "encoder.fp16.tensorrt-rtx.sm89.cache"
    assert path.read_text() == "encoder-1 encoder-4"
    trt.compiled.clear()
    TensorRtRtxEngine(bundle).run("encoder", {"pixels": images(engine, 8)}, ["embedding"])
    assert path.read_text() == "encoder-1 encoder-4 encoder-8"  # what was there was read


def test_a_bundle_that_cannot_be_written_to_runs(
    trt: FakeTensorRt, bundle: Bundle, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    ours = TensorRtRtxEngine(bundle)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ours.run("encoder", {"pixels": images(engine, 1)}, ["embedding"])["embedding"].shape[0] == 1
    assert not (bundle.path / CACHE).exists()


def test_cudas_own_errors_are_sentences(trt: FakeTensorRt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_cuda.FakeEngine.device_memory_size_v2", 1 << 40)
    with pytest.raises(EngineError, match=r"CUDA failed: out of memory \(2\)\."):
        TensorRtEngine(bundle)


@pytest.mark.usefixtures("trt")
def test_auto_takes_an_engine_that_was_built_for_this_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.engines.opening.has_cuda_device", lambda: True)
    bundle = dataclasses.replace(bundle, checksums={"golden.safetensors": bundle.checksums["golden.safetensors"]})
    assert open_engine(bundle).name == "tensorrt-cuda"
    rtx = tuple(plan for plan in bundle.built if plan.runtime == "tensorrt-rtx")
    assert open_engine(dataclasses.replace(bundle, built=rtx)).name == "tensorrt-rtx-cuda"
    old = tuple(dataclasses.replace(plan, version="9.0") for plan in rtx)
    assert open_engine(dataclasses.replace(bundle, built=old)).name == "openvino-cpu"


def engines(*plans: CompiledEngine) -> dict[str, dict[str, CompiledEngine]]:
    offered: dict[str, dict[str, CompiledEngine]] = {}
    for plan in plans:
        offered.setdefault(plan.precision, {})[plan.graph] = plan
    return offered


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            {"version": "9.8.6"},
            r"encoder\.fp16\.tensorrt-rtx\.engine was compiled by tensorrt-rtx 9\.8\.6, but 9\.8\.7 is ",
        ),
        (
            {"hardware": "sm80+sm86"},
            r"compiled for sm80 and sm86, but this GPU is sm89: .* --compute-capability 8\.9\.",
        ),
        ({"hardware": "sm120"}, "compiled for sm120, but this GPU is sm89"),
        ({"hardware": "sm890"}, "compiled for sm890, but this GPU is sm89"),
        (
            {"hardware": "sm90", "runtime": "tensorrt"},
            "compiled for sm90, but this GPU is sm89: export the bundle again here",
        ),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_an_engine_for_another_version_or_gpu_is_refused(plan: dict[str, str], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        choose(engines(built("encoder", **plan)), "tensorrt-rtx", VERSION)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cuda")
def test_the_fastest_precision_that_is_for_this_machine_is_taken() -> None:
    fits, other = built("encoder", "fp32"), built("encoder", "fp16", hardware="sm90")
    assert choose(engines(other, fits), "tensorrt-rtx", VERSION) == "fp32"
    assert choose(engines(built("encoder", "fp16"), fits), "tensorrt-rtx", VERSION) == "fp16"


def test_no_gpu_is_said_before_anything_is_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu", lambda: "")
    with pytest.raises(EngineError, match="tensorrt-rtx needs an NVIDIA GPU, but the CUDA driver finds none"):
        TensorRtRtxEngine(bundle)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_a_runtime_that_is_not_installed_is_named_with_its_extra(
    bundle: Bundle, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, runtime.replace("-", "_"), None)
    with pytest.raises(EngineError, match=rf"{runtime} is not installed: run pip install 'mixmim-serve\[{runtime}\]'"):
        open_engine(dataclasses.replace(bundle, checksums={}), runtime)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_without_engines_says_how_to_get_them(exported_bundle: Path, bundle: Bundle, runtime: str) -> None:
    with pytest.raises(
        EngineError, match=rf"has no {runtime} engine: export it with --precision fp16 --target {runtime}"
    ):
        open_engine(exported_bundle, runtime)
    with pytest.raises(
        EngineError, match=rf"has no bf16 {runtime} engine except in fp16: export it with --precision bf16"
    ):
        open_engine(dataclasses.replace(bundle, checksums={}), runtime, "bf16")
    encoder = tuple(plan for plan in bundle.built if plan.graph == "encoder")
    with pytest.raises(EngineError, match=f"has no {runtime} engine"):
        open_engine(dataclasses.replace(bundle, built=encoder, checksums={}), runtime)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with engines that TensorRT-RTX built; read-only."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this platform")
    folder = tmp_path_factory.mktemp("real")
    cache = folder / "timing.cache"
    engine = EngineOptions(capabilities=("8.0", "8.9"), batches=(1, 2, 4), timing_cache=cache)
    options = Options(("fp16",), ("tensorrt-rtx",), engine=engine)
    phases: list[str] = []
    checkpoint = write_checkpoint(folder / "small.safetensors", ENCODER_ONLY)
    exported = export_bundle(checkpoint, folder / "bundle", options, phases.append)
    assert "fp16 encoder engine for tensorrt-rtx" in phases
    assert any(" of " in phase for phase in phases)  # TensorRT's own steps
    assert cache.stat().st_size > 0
    return exported.bundle


@pytest.mark.slow
def test_a_real_engine_is_described_and_stored(real: Bundle) -> None:
    assert [(each.graph, each.precision) for each in real.built] == [("encoder", "fp16")]
    assert_engines_are_whole(real, "sm80+sm89", (1, 2, 4))


@pytest.mark.slow
def test_an_engine_with_a_changed_byte_is_refused(real: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(real.path, tmp_path / "copy"))
    path = copy / real.built[0].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{path.name} was altered after the export"):
        open_bundle(copy).verify()


@pytest.mark.usefixtures("cuda")
@pytest.mark.slow
def test_a_real_plan_that_is_damaged_is_refused_in_tensorrts_words(real: Bundle, tmp_path: Path) -> None:
    (plan,) = real.built
    (tmp_path / plan.file).write_bytes((real.path / plan.file).read_bytes()[:-100])
    with pytest.raises(EngineError, match=rf"tensorrt-rtx \S+ cannot load {plan.file}: .*Serialization") as caught:
        TensorRtRtxEngine(dataclasses.replace(real, path=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_real_bundle_is_refused_on_another_gpu(real: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu", lambda: "sm90")
    with pytest.raises(EngineError, match=r"was compiled for sm80 and sm89, but this GPU is sm90: .*capability 9\.0"):
        open_engine(real, "tensorrt-rtx")
