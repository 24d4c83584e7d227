"""Checkpoints of random networks and their bundles, for the tests of exporting."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import export.build
from export.build import Options, export_bundle
from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing
from mixmim_serve.description import Description
from mixmim_serve.engines.tensorrt_library import load
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import save_checkpoint

ENCODER_ONLY = Architecture(8, (1, 1, 1, 1), (1, 1, 2, 2), 64)
WITH_DECODER = dataclasses.replace(ENCODER_ONLY, decoder=DecoderConfig(16, 1, 2))
WITH_HEAD = dataclasses.replace(WITH_DECODER, num_classes=3)


def write_checkpoint(path: Path, arch: Architecture, noise: float = 0.1, **description: Any) -> Path:
    """Random weights, including biases and norms, so that a lost one shows."""
    torch.manual_seed(1)
    model = build_model(arch)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=noise)
    said = Description(arch, Preprocessing.evaluation(arch.image_size), **description)
    save_checkpoint(path, model.state_dict(), said)
    return path


def write_small_checkpoint(path: Path) -> Path:
    """A very small random network at 64 px, with a decoder and a head of three classes."""
    return write_checkpoint(path, WITH_HEAD, labels=("cat", "dog", "owl"), provenance={"made_by": "tests"})


def export_small_bundle(target: Path) -> None:
    """The bundle of `write_small_checkpoint`, for tests that run without torch."""
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(write_small_checkpoint(Path(folder) / "small.safetensors"), target, Options(name="small"))


@contextmanager
def graphs_from(bundle: Path) -> Iterator[None]:
    """Make `export_bundle` take each graph that `bundle` has of the same name, to save the seconds of tracing."""
    trace = export.build.export_graph

    def reuse(graph: object, images: torch.Tensor, weights: Path, target: Path) -> None:
        if (bundle / target.name).exists():
            shutil.copyfile(bundle / target.name, target)
        else:
            trace(graph, images, weights, target)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.build, "export_graph", reuse)
        yield


def export_every_precision(checkpoint: Path, target: Path, bundle: Path) -> None:
    """Export, with the fp32 graphs of `bundle`, and look at how the runtimes agree with torch."""
    options = Options(("fp32", "fp16", "bf16"), ("onnx", "openvino"))
    with graphs_from(bundle):
        exported = export_bundle(checkpoint, target, options)
    assert exported.agreement.keys() == {"fp32", "fp16", "bf16", "fp32, OpenVINO"}
    for precision, outputs in exported.agreement.items():
        assert len(outputs) == 9, precision
    assert max(each.error for each in exported.agreement["fp16"].values()) > 1e-5  # it is rounded


def assert_engines_are_whole(bundle: Bundle, hardware: str, batches: tuple[int, int, int]) -> None:
    """Each engine of TensorRT-RTX is described and stored, and nothing else was left behind."""
    version = load("tensorrt-rtx").__version__
    for each in bundle.built:
        assert (each.runtime, each.version, each.hardware, each.batches) == (
            "tensorrt-rtx", version, hardware, batches
        )  # fmt: skip
        plan = (bundle.path / each.file).read_bytes()
        assert plan[:4] == b"vtrt"  # how plans begin; then they say how long they are
        assert len(plan) == int.from_bytes(plan[16:24], "little") > 100_000
    assert not list(bundle.path.glob(".*"))  # graphs that were written for TensorRT alone
    assert open_bundle(bundle.path) == bundle
    bundle.verify()


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    export_small_bundle(Path(sys.argv[1]))
