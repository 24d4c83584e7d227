"""Verifies that a runtime agrees with torch on real photos; an export that disagrees is never written."""

from __future__ import annotations

import dataclasses
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mixmim_serve.bundle import Bundle, graph_file
from mixmim_serve.config import Preprocessing
from mixmim_serve.engines.base import Arrays, Engine
from mixmim_serve.engines.certificate import TOLERANCES, Agreement, measure
from mixmim_serve.engines.onnx import OnnxEngine
from mixmim_serve.errors import BundleError
from mixmim_serve.preprocess import preprocess


def photos(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The CC0 photos shipped with this package, preprocessed: uint8 (4, size, size, 3)."""
    folder = files("export") / "photos"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".jpg")), key=lambda path: path.name)
    return np.stack([preprocess(path.read_bytes(), preprocessing) for path in paths])


def verify_precision(bundle: Bundle, precision: str, golden: Arrays) -> dict[str, Agreement]:
    """Run the graphs of one precision in ONNX Runtime and compare with the golden arrays.

    On a CPU ONNX Runtime has no bf16 kernels: bf16 graphs are widened to float32, which verifies graph and weights but
    not the rounding of single operations.

    Raises:
        BundleError: when an output exceeds the precision's tolerance.
    """
    if precision != "bf16":
        return compare(golden, OnnxEngine(bundle, precision), precision)
    with tempfile.TemporaryDirectory() as folder:
        for graph in bundle.graphs:
            widen(bundle.graph_path(graph, precision), Path(folder) / graph_file(graph, "fp32"))
        return compare(
            golden, OnnxEngine(dataclasses.replace(bundle, path=Path(folder), precisions=("fp32",))), precision
        )


def compare(golden: Arrays, engine: Engine, precision: str) -> dict[str, Agreement]:
    """Agreement of each output with its golden array.

    Raises:
        BundleError: when one of them exceeds the tolerance.
    """
    agreements = measure(engine, golden)
    for name, agreement in agreements.items():
        if not agreement.within(TOLERANCES[precision]):
            raise BundleError(
                f"{engine.name} differs from torch by {agreement.error:.2g} of the largest value in {name} (cosine "
                f"{agreement.cosine:.6f}), more than {precision} allows: the bundle was not written; try another "
                "version of torch or of the runtime."
            )
    return agreements


def widen(source: Path, target: Path) -> None:
    """Copy an ONNX graph, replacing bfloat16 with float32 throughout."""
    model = onnx.load(source)
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    del model.graph.value_info[:]  # their types are outdated
    onnx.save(model, target, save_as_external_data=True, location=f"{target.stem}.weights")
