"""Graphs in fp16 and bf16, the operators that graphs are made of, and TensorRT engines."""

from __future__ import annotations

import collections
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import ENCODER_ONLY, assert_engines_are_whole, graphs_from, write_checkpoint
from onnx import TensorProto
from safetensors.numpy import load_file

from export.build import Options, export_bundle
from export.tensorrt import EngineOptions, build_engine
from export.verify import widen
from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.config import architecture
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.certificate import TOLERANCES
from mixmim_serve.errors import BundleError, ConfigError, EngineError

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CAPABILITY = ("8.9",)


@pytest.fixture(scope="module")
def bundle(bundle_in_every_precision: Path) -> Bundle:
    """With every precision; read-only. What needs it is slow: its graphs take half a minute."""
    return open_bundle(bundle_in_every_precision)


def graph_of(bundle: Bundle, name: str, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(name, precision), load_external_data=False)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["encoder", "reconstruct"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_computes_in_its_precision(bundle: Bundle, graph: str, precision: str) -> None:
    model = graph_of(bundle, graph, precision)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.data_type for tensor in external} == {TYPES[precision]}
    file = "weights.safetensors" if precision == "fp32" else f"weights.{precision}.safetensors"
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {file}
    images = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert set(images.values()) <= {TensorProto.UINT8, TensorProto.BOOL}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_norms_and_softmax_stay_in_float32(bundle: Bundle, precision: str) -> None:
    """In fp16 the squares of large activations overflow (Triton issue 4105)."""
    model = graph_of(bundle, "encoder", precision)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(norms) == 2 * 4 + 1 + 3 + 1  # blocks, patch embedding, patch merging, the last
    assert len(attentions) == 4
    for node in norms:
        assert next((a.i for a in node.attribute if a.name == "stash_type"), 1) == TensorProto.FLOAT
    for node in attentions:
        assert next(a.i for a in node.attribute if a.name == "softmax_precision") == TensorProto.FLOAT


@pytest.mark.slow
def test_the_encoder_has_no_slices_and_few_transposes(bundle: Bundle) -> None:
    model = graph_of(bundle, "encoder", "fp32")
    inputs = {value.name for value in model.graph.initializer}
    count = collections.Counter(
        node.op_type for node in model.graph.node if not all(name in inputs for name in node.input)
    )
    assert not {"Slice", "Split", "Squeeze", "Unsqueeze", "Concat", "Shape"} & count.keys()
    # Channels first and patches (2), windows of stages 1 to 3 in and out (6), merging (3), maps (4), biases (4).
    assert count["Transpose"] <= 19


@pytest.mark.slow
def test_large_activations_do_not_overflow_in_fp16(bundle: Bundle, small_checkpoint: Path, tmp_path: Path) -> None:
    """Squares of 3,000 are beyond fp16; a norm that was computed in it would give zeros or NaN."""
    import torch

    from mixmim_serve.model.checkpoint import read_checkpoint, save_checkpoint

    path = tmp_path / "large.safetensors"
    description, weights = read_checkpoint(small_checkpoint)
    weights["patch_embed.norm.weight"] = torch.full_like(weights["patch_embed.norm.weight"], 3000.0)
    save_checkpoint(path, weights, description)
    with graphs_from(bundle.path):
        exported = export_bundle(path, tmp_path / "bundle", Options(("fp16",)))
    assert all(each.within(TOLERANCES["fp16"]) for each in exported.agreement["fp16"].values())
    stage = load_file(tmp_path / "bundle" / "golden.safetensors")["encoder.stage1"]
    assert np.abs(stage).max() > 3000


@pytest.mark.slow  # no other test needs these graphs
def test_half_weights_are_not_stored_twice(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "small.safetensors", ENCODER_ONLY)
    exported = export_bundle(checkpoint, tmp_path / "half", Options(("fp32", "fp16"), half_weights=True))
    assert {path.name for path in exported.bundle.path.glob("weights*")} == {"weights.safetensors"}
    assert (exported.bundle.weights, exported.bundle.precisions) == ("float16", ("fp32", "fp16"))


@pytest.mark.slow
def test_onnx_runtime_runs_what_the_bundle_has(bundle: Bundle, small_checkpoint: Path, tmp_path: Path) -> None:
    assert open_engine(bundle, "onnx").precision == "fp32"
    assert open_engine(bundle, "onnx", "fp16").precision == "fp16"
    with pytest.raises(EngineError, match=r"ONNX Runtime \S+ cannot load .*encoder\.bf16\.onnx"):
        open_engine(bundle, "onnx", "bf16")  # no kernels for it on a CPU
    with graphs_from(bundle.path):
        alone = export_bundle(small_checkpoint, tmp_path / "fp16", Options(("fp16",))).bundle
    assert open_engine(alone, "onnx").precision == "fp16"
    with pytest.raises(BundleError, match="has no fp32 graphs, only fp16: export it with --precision fp32"):
        open_engine(alone, "openvino")


@pytest.mark.slow
def test_widened_graphs_are_float32_throughout(bundle: Bundle, tmp_path: Path) -> None:
    widen(bundle.graph_path("encoder", "bf16"), tmp_path / "encoder.onnx")
    model = onnx.load(tmp_path / "encoder.onnx")
    assert TensorProto.BFLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}
    assert b"bf16" not in (tmp_path / "encoder.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precisions": ("int8",)}, "unknown precision 'int8': choose one of fp32, fp16, bf16"),
        ({"targets": ("tensort",)}, r"unknown target 'tensort': choose one of .*Did you mean tensorrt\?"),
        ({"targets": ("openvino",), "precisions": ("fp16",)}, "OpenVINO takes the fp32 graphs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, tuple[str, ...]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Options(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "module"),
    [("openvino", "openvino"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")],
)
def test_a_target_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"mixmim_serve.engines.{module}", raising=False)
    heard: list[str] = []
    with pytest.raises(EngineError, match=rf"is not installed: run pip install 'mixmim-serve\[{target}\]'"):
        export_bundle(tmp_path / "none.safetensors", tmp_path / "bundle", Options(targets=(target,)), heard.append)
    assert not heard
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # four engines take a minute; test_tensorrt.py builds one
def test_tensorrt_builds_both_graphs_in_each_precision(small_checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this platform")
    cache = tmp_path / "timing.cache"
    engine = EngineOptions(capabilities=CAPABILITY, batches=(1, 4, 8), timing_cache=cache)
    options = Options(("fp32", "fp16"), ("tensorrt-rtx",), engine=engine)
    phases: list[str] = []
    with graphs_from(bundle.path):
        exported = export_bundle(small_checkpoint, tmp_path / "engines", options, phases.append).bundle
    assert "fp16 reconstruct engine for tensorrt-rtx" in phases
    assert any(" of " in phase for phase in phases)  # TensorRT's own steps
    assert cache.stat().st_size > 0
    assert [(each.graph, each.precision) for each in exported.built] == [
        ("encoder", "fp32"), ("reconstruct", "fp32"), ("encoder", "fp16"), ("reconstruct", "fp16")
    ]  # fmt: skip
    assert_engines_are_whole(exported, "sm89", (1, 4, 8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capabilities": ("9.0",)}, r"cannot build for compute capability 9\.0: choose one of .*8\.9, 12\.0"),
        ({"capabilities": ()}, "tensorrt-rtx found no GPU to build for: name one with --compute-capability"),
        ({"runtime": "tensorrt"}, r"tensorrt is not installed: run pip install 'mixmim-serve\[tensorrt\]'"),
    ],
)
def test_tensorrt_says_what_it_cannot_do(
    options: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("mixmim_serve.engines.hardware.gpu", lambda: "")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises((BundleError, EngineError), match=sentence):
        build_engine(tmp_path / "none.onnx", EngineOptions(**({"runtime": "tensorrt-rtx"} | options)))  # type: ignore[arg-type]


def test_tensorrt_refuses_what_is_no_graph_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"tensorrt-rtx \S+ cannot read encoder\.onnx: ") as caught:
        build_engine(tmp_path / "encoder.onnx", EngineOptions("tensorrt-rtx", capabilities=CAPABILITY))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batches", [(0, 1, 2), (4, 2, 8), (1, 8, 4)])
def test_batches_must_rise(batches: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="batches must be three rising numbers"):
        EngineOptions(batches=batches)


@pytest.mark.slow
def test_base_builds_in_fp16(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = write_checkpoint(tmp_path / "base.safetensors", architecture("base"), 0.01)
    options = Options(("fp16",), ("tensorrt-rtx",), engine=EngineOptions(capabilities=CAPABILITY))
    assert [each.graph for each in export_bundle(path, tmp_path / "base", options).bundle.built] == [
        "encoder",
        "reconstruct",
    ]
    shutil.rmtree(tmp_path)
