"""ONNX Runtime: the CPU, or a CUDA device where onnxruntime-gpu finds one."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle
from mixmim_serve.engines.base import Arrays, best_precision, check_request, graph_inputs
from mixmim_serve.engines.hardware import first_line, has_cuda_device, processor
from mixmim_serve.errors import EngineError

try:
    import onnxruntime
except ImportError as error:
    raise EngineError(
        "ONNX Runtime is not installed: run pip install 'mixmim-serve[cpu]' (or [gpu], never both)."
    ) from error


class OnnxEngine:
    """A session a graph, opened when the graph is first asked for."""

    version: str = onnxruntime.__version__

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0) -> None:
        _refuse_both_packages()
        self.bundle = bundle
        self.providers = _providers()
        cuda = "CUDAExecutionProvider" in self.providers
        self.name, self.hardware = ("onnx-cuda", "CUDA") if cuda else ("onnx-cpu", processor())
        self.precision = precision or best_precision(bundle, ("fp16", "fp32") if cuda else ("fp32", "fp16"))
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._opening = threading.Lock()
        self._session("encoder")

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            arrays = self._session(graph).run(list(outputs), feed)
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise EngineError(f"ONNX Runtime failed on the {graph} graph: {first_line(error)}") from error
        return dict(zip(outputs, arrays, strict=True))

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._opening:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        path = self.bundle.graph_path(graph, self.precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(path, options, providers=self.providers)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {first_line(error)}"
            ) from error


def _providers() -> list[str]:
    available = onnxruntime.get_available_providers()
    wanted = ["CPUExecutionProvider"]
    if has_cuda_device():
        wanted.insert(0, "CUDAExecutionProvider")
    return [name for name in wanted if name in available]


def _refuse_both_packages() -> None:
    """The two packages write the same files: with both, which one runs is chance."""
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "run pip uninstall onnxruntime onnxruntime-gpu, then install the one you need."
        )


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
