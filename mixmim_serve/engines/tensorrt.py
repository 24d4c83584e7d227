"""TensorRT and TensorRT-RTX: run the engines that `mixmim export` compiled into the bundle.

Pinned host memory, one stream, one set of device buffers for all batch sizes, and a CUDA graph per bucket.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mixmim_serve.bundle import PRECISIONS, Bundle, CompiledEngine
from mixmim_serve.engines import hardware
from mixmim_serve.engines.base import Arrays, check_request, graph_inputs
from mixmim_serve.engines.cuda import CudaStream
from mixmim_serve.engines.tensorrt_library import load
from mixmim_serve.engines.tensorrt_program import Program
from mixmim_serve.errors import EngineError

FASTEST = ("fp16", "bf16", "fp32")

log = logging.getLogger(__name__)


class TensorRtEngine:
    """One program per graph, loaded when the graph is first run; concurrent calls wait."""

    runtime = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0, cuda_graphs: bool = True) -> None:
        """`threads` has no effect on a GPU; without `cuda_graphs` each kernel is queued separately."""
        self.bundle, self.cuda_graphs = bundle, cuda_graphs
        available = engines_of(bundle, self.runtime, precision)
        self.trt = load(self.runtime)
        self.version = str(self.trt.__version__)
        self.hardware = hardware.gpu_name()
        self.precision = choose(available, self.runtime, self.version)
        self.engines = available[self.precision]
        self.name = f"{self.runtime}-cuda"
        self.max_batch: int | None = min(engine.batches[2] for engine in self.engines.values())
        self._programs: dict[str, Program] = {}
        self._running = threading.Lock()
        self._stream = CudaStream()
        with self._running:
            self._program("encoder")

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        batch = len(next(iter(inputs.values())))
        if self.max_batch is not None and batch > self.max_batch:
            raise EngineError(
                f"{self.name} was compiled for batches of at most {self.max_batch}, got {batch}: pass fewer rows, or "
                f"export with --batches 1 8 {batch}."
            )
        with self._running:
            return self._program(graph).run(inputs, outputs)

    def _program(self, graph: str) -> Program:
        if graph not in self._programs:
            engine = self.engines[graph]
            self._programs[graph] = Program(self.trt, self.bundle, engine, self._stream, self.cuda_graphs)
        return self._programs[graph]


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT-RTX, which compiles an engine's kernels for the GPU on loading."""

    runtime = "tensorrt-rtx"


def engines_of(bundle: Bundle, runtime: str, precision: str = "") -> dict[str, dict[str, CompiledEngine]]:
    """The bundle's engines for a runtime, by precision (fastest first) and graph.

    Raises:
        EngineError: when no precision has engines for all graphs.
    """
    engines: dict[str, dict[str, CompiledEngine]] = {}
    for name in (precision,) if precision else FASTEST:
        by_graph = {e.graph: e for e in bundle.built if (e.runtime, e.precision) == (runtime, name)}
        if by_graph.keys() >= bundle.graphs.keys():
            engines[name] = by_graph
    if not engines:
        kind = f"{precision} {runtime}" if precision else runtime
        others = [name for name in PRECISIONS if any((e.runtime, e.precision) == (runtime, name) for e in bundle.built)]
        raise EngineError(
            f"{bundle.path} has no {kind} engine{' except in ' + ', '.join(others) if others else ''}: export it with "
            f"--precision {precision or FASTEST[0]} --target {runtime}."
        )
    return engines


def choose(available: Mapping[str, Mapping[str, CompiledEngine]], runtime: str, version: str) -> str:
    """The first precision whose engines fit this machine; checked before anything is loaded.

    Raises:
        EngineError: why the engines of the first precision do not fit.
    """
    if not hardware.gpu():
        raise EngineError(f"{runtime} needs an NVIDIA GPU, but the CUDA driver finds none: choose another engine.")
    errors = []
    for precision, engines in available.items():
        try:
            for engine in engines.values():
                check_compatible(engine, version)
        except EngineError as error:
            log.info("%s", error)
            errors.append(error)
        else:
            return precision
    raise errors[0]


def check_compatible(engine: CompiledEngine, version: str) -> None:
    """Check that an engine was compiled for this runtime version and GPU.

    Raises:
        EngineError: when it is not.
    """
    if engine.version != version:
        raise EngineError(
            f"{engine.file} was compiled by {engine.runtime} {engine.version}, but {version} is installed: export the "
            "bundle again, or install that version."
        )
    gpu = hardware.gpu()
    if gpu not in engine.hardware.split("+"):
        option = f"with --compute-capability {gpu[2:-1]}.{gpu[-1]}" if engine.runtime == "tensorrt-rtx" else "here"
        raise EngineError(
            f"{engine.file} was compiled for {engine.hardware.replace('+', ' and ')}, but this GPU is {gpu}: export "
            f"the bundle again {option}."
        )
