"""OpenVINO on the CPU: bf16 if the processor supports it (AMX or AVX512-BF16), else float32."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import POOLED, Bundle
from mixmim_serve.engines.base import Arrays, check_request, graph_inputs
from mixmim_serve.engines.hardware import first_line, processor
from mixmim_serve.errors import EngineError

try:
    import openvino
    from openvino import properties
    from openvino.frontend import FrontEndManager
except ImportError as error:
    raise EngineError("OpenVINO is not installed: run pip install 'mixmim-serve[openvino]'.") from error

TYPES = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}


@functools.cache
def core() -> openvino.Core:
    """OpenVINO's core, kept until the process ends.

    The CPU plugin gives the thread that loads it a signal stack, and unmaps it when the last core is deleted, in any
    thread: the next signal would end the process with SIGSEGV (OpenVINO 2026.4).
    """
    return openvino.Core()


def has_bf16() -> bool:
    """Whether the processor has bf16 instructions."""
    return "BF16" in core().get_property("CPU", properties.device.capabilities)


class OpenVinoEngine:
    """Models compiled from the float32 graphs when they are first run.

    The encoder is compiled for the embedding and logits, and a second time when stages are first requested: these
    expose the residual stream, which OpenVINO then keeps in float32, making every output slower. A request for both
    runs both models, so that an embedding never depends on the other outputs of its request.
    All cores work on one batch at a time; concurrent calls wait.
    """

    name = "openvino-cpu"
    version: str = openvino.__version__.partition("-")[0]
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0) -> None:
        self.bundle = bundle
        self.hardware = processor()
        self.precision = precision or ("bf16" if has_bf16() else "fp32")
        if self.precision not in TYPES:
            raise EngineError(f"OpenVINO computes in {' or '.join(TYPES)} on a CPU, not in {self.precision}.")
        if self.precision == "bf16" and not has_bf16():
            raise EngineError(f"{self.hardware} has no bf16 instructions: choose fp32.")
        self._settings: dict[Any, Any] = {
            properties.hint.inference_precision: TYPES[self.precision],
            # THROUGHPUT halves the speed on two cores: it splits them into streams with a batch each.
            properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
            # Pinned threads spin while another thread decodes on their core, even if other cores are idle: 12 % more
            # CPU time per image in a server under load.
            properties.hint.enable_cpu_pinning: False,
        }
        if threads:
            self._settings[properties.inference_num_threads] = threads
        self._requests: dict[tuple[str, bool], Any] = {}
        self._running = threading.Lock()
        self._request("encoder", pooled=True)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        results: Arrays = {}
        with self._running:  # a request owns its output tensors until they are copied
            for pooled in (True, False):
                names = [name for name in outputs if (name in POOLED) == pooled]
                if names:
                    results |= self._infer(graph, feed, names, pooled=pooled)
        return {name: results[name] for name in outputs}

    def _infer(self, graph: str, feed: Arrays, names: Sequence[str], *, pooled: bool) -> Arrays:
        request = self._request(graph, pooled=pooled)
        try:
            request.infer(feed, share_inputs=True)
        except Exception as error:
            raise EngineError(f"OpenVINO failed on the {graph} graph: {first_line(error)}") from error
        return {name: request.get_tensor(name).data.copy() for name in names}

    def _request(self, graph: str, *, pooled: bool) -> Any:
        if (graph, pooled) not in self._requests:
            path = self.bundle.graph_path(graph)
            try:
                compiled = core().compile_model(read_graph(path, pooled=pooled), "CPU", self._settings)
                self._requests[graph, pooled] = compiled.create_infer_request()
            except Exception as error:
                raise EngineError(f"OpenVINO {self.version} cannot load {path}: {first_line(error)}") from error
        return self._requests[graph, pooled]


def read_graph(path: Path, *, pooled: bool) -> openvino.Model:
    """Read an ONNX graph for compilation; `pooled` drops the encoder's stages."""
    # Without the format's name OpenVINO tries every format on a damaged file, TensorFlow among them.
    reader = FrontEndManager().load_by_framework("onnx")
    model = reader.convert(reader.load(str(path)))
    _trust_softmax(model)
    for result in model.get_results() if pooled else ():
        if not result.input_value(0).get_names() & set(POOLED):
            model.remove_result(result)
    return model


def _trust_softmax(model: openvino.Model) -> None:
    """Remove what OpenVINO adds after each Attention operator: zeros for rows whose scores are all -inf.

    We block scores with -1e4, so no such row exists, and the check reads and writes every value again.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Select" and node.input_value(0).get_node().get_type_name() == "IsNaN":
            node.output(0).replace(node.input_value(2))
