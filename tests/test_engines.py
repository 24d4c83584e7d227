"""Engines by their numbers: certificates, precisions, the choice of the fastest, and how wrong ones are refused."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPOSITORY
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine, opening
from mixmim_serve.engines import onnx as onnx_engine
from mixmim_serve.engines.base import Arrays, graph_inputs
from mixmim_serve.engines.certificate import FOLDER, TOLERANCES, Agreement, agreement, certificates, certify, measure
from mixmim_serve.engines.hardware import processor
from mixmim_serve.engines.onnx import cache_options
from mixmim_serve.engines.openvino import OpenVinoEngine, core, read_graph
from mixmim_serve.errors import EngineError

TINY = REPOSITORY / "mixmim_serve" / "bundles" / "tiny"


class Altered:
    """An engine one of whose outputs is a little off."""

    def __init__(self, engine: Engine, by: float) -> None:
        self.engine, self.by = engine, by
        self.bundle, self.name, self.precision = engine.bundle, engine.name, engine.precision
        self.version, self.hardware = engine.version, engine.hardware
        self.max_batch = engine.max_batch
        self.runs = 0

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.runs += 1
        results = self.engine.run(graph, inputs, outputs)
        results[outputs[0]] = results[outputs[0]] * np.float32(1 + self.by)
        return results


@pytest.fixture
def plain(bundle_copy: Path) -> Engine:
    """ONNX Runtime with a bundle of its own."""
    return open_engine(bundle_copy, "onnx", threads=1)


def has_bf16(bundle: Path) -> bool:
    return OpenVinoEngine(open_bundle(bundle)).precision == "bf16"


@pytest.mark.parametrize(("kind", "precision"), [("onnx", "fp32"), ("openvino", "fp32"), ("torch", "fp32")])
def test_every_engine_gives_torchs_numbers(kind: str, precision: str) -> None:
    found = certify(open_engine(TINY, kind, precision))
    assert found.holds
    assert found.outputs.keys() > {"encoder.embedding", "encoder.stage4", "reconstruct.reconstruction_b"}
    assert found.error < 1e-5  # far inside the tolerance: only the order of sums differs


def test_openvino_rounds_to_bf16_where_the_processor_can() -> None:
    if not has_bf16(TINY):
        with pytest.raises(EngineError, match="has no bf16 instructions: choose fp32"):
            open_engine(TINY, "openvino", "bf16")
        return
    found = certify(open_engine(TINY, "openvino"))
    assert (found.precision, found.holds) == ("bf16", True)
    assert 1e-4 < found.error < TOLERANCES["bf16"].error  # rounded, and no more than that


def test_openvino_computes_what_is_asked_for(exported_bundle: Path) -> None:
    """The embedding comes from a graph without stages, in which nothing looks for rows whose scores are all -inf."""
    engine = open_engine(exported_bundle, "openvino", "fp32", threads=1)
    whole, pooled = (read_graph(exported_bundle / "encoder.onnx", pooled=pooled) for pooled in (False, True))
    assert (len(whole.get_results()), len(pooled.get_results())) == (6, 2)
    assert not [node for node in whole.get_ops() if node.get_type_name() == "IsNaN"]
    pixels = {"pixels": load_file(exported_bundle / "golden.safetensors")["encoder.pixels"]}
    alone = engine.run("encoder", pixels, ["embedding"])["embedding"]
    beside = engine.run("encoder", pixels, ["stage1", "embedding"])["embedding"]
    np.testing.assert_array_equal(alone, beside)


@pytest.mark.parametrize("graph", ["encoder", "reconstruct"])
def test_openvino_runs_each_norm_as_one_kernel(exported_bundle: Path, graph: str) -> None:
    compiled = core().compile_model(read_graph(exported_bundle / f"{graph}.onnx", pooled=graph == "encoder"), "CPU")
    kinds = [str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ops()]
    model = onnx.load(exported_bundle / f"{graph}.onnx", load_external_data=False)
    assert kinds.count("MVN") == sum(node.op_type == "LayerNormalization" for node in model.graph.node)
    assert "RMS" not in kinds


def test_openvino_has_no_fp16() -> None:
    with pytest.raises(EngineError, match="OpenVINO computes in fp32 or bf16 on a CPU, not in fp16"):
        open_engine(TINY, "openvino", "fp16")
    with pytest.raises(EngineError, match="unknown precision 'int3': choose one of fp32, fp16, bf16"):
        open_engine(TINY, "openvino", "int3")


def test_openvino_says_in_a_sentence_that_a_graph_is_damaged(bundle_copy: Path) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"OpenVINO \S+ cannot load \S+encoder\.onnx: ") as caught:
        OpenVinoEngine(open_bundle(bundle_copy))
    assert "\n" not in str(caught.value)


def test_an_openvino_engine_may_end_in_another_thread() -> None:
    """OpenVINO gives its thread a signal stack and unmaps it, in whatever thread, when its last core goes."""
    code = f"""
import faulthandler, gc, os, signal, threading
from pathlib import Path
from mixmim_serve.engines import open_engine
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
engines = [open_engine(Path({str(TINY)!r}), "openvino")]
thread = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_torch_can_round_to_bf16() -> None:
    found = certify(open_engine(TINY, "torch", "bf16"))
    assert found.holds
    assert found.error > 1e-4


def test_a_certificate_is_measured_once(plain: Engine) -> None:
    engine = Altered(plain, 0.0)
    first = certify(engine)
    assert first.holds
    assert engine.runs == 4  # both graphs, each with all golden rows and with one
    assert certify(engine) == first
    assert engine.runs == 4
    (path,) = (plain.bundle.path / FOLDER).iterdir()
    assert path.name.startswith("onnx-cpu-fp32-")
    assert certificates(plain.bundle) == [first]


@pytest.mark.parametrize("name", ["version", "hardware", "precision", "name"])
def test_another_engine_needs_another_certificate(plain: Engine, name: str) -> None:
    engine = Altered(plain, 0.0)
    certify(engine)
    setattr(engine, name, "bf16" if name == "precision" else "other")
    certify(engine)
    assert engine.runs == 8
    assert len(certificates(plain.bundle)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"outputs": 3}', '{"outputs": {}, "engine": "onnx-cpu"}'])
def test_a_damaged_certificate_is_measured_again(plain: Engine, content: str) -> None:
    first = certify(plain)
    (path,) = (plain.bundle.path / FOLDER).iterdir()
    path.write_text(content)
    assert certificates(plain.bundle) == []
    assert certify(plain) == first
    assert json.loads(path.read_text())["engine"] == "onnx-cpu"


def test_other_golden_arrays_need_another_certificate(plain: Engine) -> None:
    engine = Altered(plain, 0.0)
    certify(engine)
    (path,) = (plain.bundle.path / FOLDER).iterdir()
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"golden": "0" * 64}))
    certify(engine)
    assert engine.runs == 8


def test_a_bundle_that_cannot_be_written_to_is_measured_each_time(
    plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert certify(plain).holds
    assert not (plain.bundle.path / FOLDER).exists()


@pytest.mark.parametrize("by", [2e-3, -2e-3, float("nan"), float("inf")])
def test_wrong_numbers_are_refused_with_the_numbers(plain: Engine, by: float) -> None:
    found = certify(Altered(plain, by))
    assert not found.holds
    with pytest.raises(
        EngineError, match=r"onnx-cpu fp32 deviates from torch on this model: the cosine of encoder.embedding is"
    ):
        found.require()
    assert certificates(plain.bundle)[0].holds is False  # kept as refused, not as passed


def test_auto_passes_over_what_is_not_installed_and_what_is_wrong(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = opening._open

    def openvino_is_wrong(bundle: Any, kind: str, precision: str, threads: int) -> Engine:
        engine = opened(bundle, kind, precision, threads)
        return Altered(engine, 0.5) if kind == "openvino" else engine

    monkeypatch.setattr(opening, "has_cuda_device", lambda: False)
    assert open_engine(bundle_copy).name == "openvino-cpu"
    shutil.rmtree(bundle_copy / FOLDER)
    monkeypatch.setattr(opening, "_open", openvino_is_wrong)
    with caplog.at_level(logging.WARNING):
        assert open_engine(bundle_copy).name == "onnx-cpu"
    assert "openvino-cpu" in caplog.text
    assert "deviates from torch" in caplog.text

    def only_torch(bundle: Any, kind: str, precision: str, threads: int) -> Engine:
        if kind != "torch":
            raise EngineError(f"{kind} is not installed.")
        return opened(bundle, kind, precision, threads)

    monkeypatch.setattr(opening, "_open", only_torch)
    assert open_engine(bundle_copy).name == "torch-cpu"
    monkeypatch.setattr(opening, "_ON_CPU", ("openvino", "onnx"))
    with pytest.raises(
        EngineError, match=r"no installed engine can run this bundle\. openvino is not installed\. onnx is"
    ):
        open_engine(bundle_copy)


def test_auto_asks_for_the_gpu_first(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bundle without TensorRT engines, and packages of which only torch can use the GPU."""
    opened, asked = opening._open, []

    def torch_uses_it(bundle: Any, kind: str, precision: str, threads: int) -> Engine:
        asked.append(kind)
        engine = opened(bundle, kind, precision, threads)
        if kind == "torch":
            engine.name = "torch-cuda"
        return engine

    monkeypatch.setattr(opening, "has_cuda_device", lambda: True)
    monkeypatch.setattr(opening, "_open", torch_uses_it)
    with caplog.at_level(logging.INFO):
        assert open_engine(bundle_copy).name == "torch-cuda"
    assert asked == ["tensorrt", "tensorrt-rtx", "onnx", "torch"]
    assert "has no tensorrt-rtx engine: export it with --precision fp16 --target tensorrt-rtx" in caplog.text


def test_auto_on_a_gpu_that_no_package_can_use_is_auto_on_a_cpu(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "has_cuda_device", lambda: True)
    assert open_engine(bundle_copy, "auto", "fp32").name == "openvino-cpu"


def test_an_empty_batch_is_refused(plain: Engine) -> None:
    with pytest.raises(EngineError, match="the batch is empty: pass at least one row"):
        plain.run("encoder", {"pixels": np.zeros((0, 64, 64, 3), np.uint8)}, ["embedding"])


def test_the_fingerprint_says_how_it_was_computed(bundle_copy: Path) -> None:
    engines = [open_engine(bundle_copy, kind, "fp32") for kind in ("onnx", "openvino", "torch")]
    rounded = open_engine(bundle_copy, "torch", "bf16")
    found = [engine_fingerprint(engine) for engine in (*engines, rounded)]
    assert len({*found, open_bundle(bundle_copy).fingerprint}) == 5
    assert engine_fingerprint(open_engine(bundle_copy, "onnx", threads=1)) == found[0]


def test_agreement_is_of_the_worst_row() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 10.0]], np.float32)
    same = agreement(expected, expected)
    assert (same.cosine, same.error) == (pytest.approx(1), 0)
    turned = agreement(np.array([[4.0, -3.0], [0.0, 10.0]], np.float32), expected)
    assert turned.cosine == pytest.approx(0)
    assert turned.error == pytest.approx(0.7)
    assert not agreement(np.full((2, 2), np.nan, np.float32), expected).within(TOLERANCES["bf16"])
    assert not Agreement(1.0, 0.2).within(TOLERANCES["bf16"])


def test_golden_rows_run_alone_and_together(plain: Engine) -> None:
    sizes = []

    class Counting(Altered):
        def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
            assert inputs.keys() == graph_inputs(self.bundle, graph).keys()
            sizes.append((graph, len(next(iter(inputs.values())))))
            return super().run(graph, inputs, outputs)

    measure(Counting(plain, 0.0), load_file(plain.bundle.path / "golden.safetensors"))
    assert sizes == [("encoder", 2), ("encoder", 1), ("reconstruct", 1), ("reconstruct", 1)]


def test_the_processor_has_a_name() -> None:
    assert len(processor()) > 2


def test_tensorrt_inside_onnx_runtime_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_engine, "has_cuda_device", lambda: False)
    with pytest.raises(EngineError, match="onnx-tensorrt needs an NVIDIA GPU, but the CUDA driver finds none"):
        open_engine(TINY, "onnx-tensorrt")
    monkeypatch.setattr(onnx_engine, "has_cuda_device", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [onnx_engine.CUDA, onnx_engine.CPU])
    with pytest.raises(EngineError, match=r"this ONNX Runtime lacks TensorRT: run pip install 'mixmim-serve\[gpu\]'"):
        open_engine(TINY, "onnx-tensorrt")


def test_tensorrt_inside_onnx_runtime_compiles_for_all_buckets_at_once(bundle_copy: Path) -> None:
    engine = object.__new__(onnx_engine.OnnxTensorRtEngine)
    engine.bundle, engine.precision, engine.device = open_bundle(bundle_copy), "fp16", "cuda"
    (name, options), *others = engine._providers("reconstruct")
    assert [name, *(other for other, _ in others)] == [onnx_engine.TENSORRT, onnx_engine.CUDA, onnx_engine.CPU]
    shapes = "image_a:{0}x64x64x3,image_b:{0}x64x64x3,from_partner:{0}x4"
    assert options["trt_profile_min_shapes"] == shapes.format(1)
    assert options["trt_profile_max_shapes"] == shapes.format(32)
    assert (options["trt_fp16_enable"], options["trt_bf16_enable"]) == (True, False)
    assert options["trt_engine_cache_path"] == str(bundle_copy / "cache" / "onnx-tensorrt")
    assert cache_options(bundle_copy / "config.json" / "folder") == {}


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_onnx_runtime_cannot_use_is_no_cpu_in_disguise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime warns, and goes on with the next provider."""
    monkeypatch.setattr(onnx_engine, "has_cuda_device", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [onnx_engine.CUDA, onnx_engine.CPU])
    with pytest.raises(
        EngineError, match=r"cannot load its CUDAExecutionProvider: run pip install 'mixmim-serve\[gpu\]'"
    ):
        open_engine(TINY, "onnx")
