"""TensorRT and TensorRT-RTX: run the engines that `mixmim export` built and put into the bundle.

Pinned memory on the host, one stream, one set of device buffers for all batch sizes, and a CUDA graph for each bucket.
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
from mixmim_serve.engines.cuda import Stream
from mixmim_serve.engines.tensorrt_library import load
from mixmim_serve.engines.tensorrt_program import Program
from mixmim_serve.errors import EngineError

FASTEST = ("fp16", "bf16", "fp32")

log = logging.getLogger(__name__)


class TensorRtEngine:
    """A program a graph, loaded when the graph is first asked for; calls wait for each other."""

    runtime = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0, cuda_graphs: bool = True) -> None:
        """`threads` is for other engines; `cuda_graphs` False queues each kernel by itself."""
        self.bundle, self.cuda_graphs = bundle, cuda_graphs
        offered = engines_of(bundle, self.runtime, precision)
        self.trt = load(self.runtime)
        self.version = str(self.trt.__version__)
        self.hardware = hardware.gpu_name()
        self.precision = choose(offered, self.runtime, self.version)
        self.built = offered[self.precision]
        self.name = f"{self.runtime}-cuda"
        self.max_batch: int | None = min(built.batches[2] for built in self.built.values())
        self._programs: dict[str, Program] = {}
        self._running = threading.Lock()
        self._stream = Stream()
        with self._running:
            self._program("encoder")

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        batch = len(next(iter(inputs.values())))
        if self.max_batch is not None and batch > self.max_batch:
            raise EngineError(
                f"{self.name} was built for batches of at most {self.max_batch}, got {batch}: send fewer at a time, or "
                f"export with --batches 1 8 {batch}."
            )
        with self._running:
            return self._program(graph).run(inputs, outputs)

    def _program(self, graph: str) -> Program:
        if graph not in self._programs:
            built = self.built[graph]
            self._programs[graph] = Program(self.trt, self.bundle, built, self._stream, self.cuda_graphs)
        return self._programs[graph]


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT-RTX, which compiles a plan's kernels for the GPU when it is loaded."""

    runtime = "tensorrt-rtx"


def engines_of(bundle: Bundle, runtime: str, precision: str = "") -> dict[str, dict[str, CompiledEngine]]:
    """By precision, fastest first, and graph: what the bundle has for a runtime.

    Raises:
        EngineError: when there is none, or one for some graphs only.
    """
    wanted = (precision,) if precision else FASTEST
    found: dict[str, dict[str, CompiledEngine]] = {}
    for each in wanted:
        built = {one.graph: one for one in bundle.built if (one.runtime, one.precision) == (runtime, each)}
        if built.keys() >= bundle.graphs.keys():
            found[each] = built
    if not found:
        what = f"{precision} {runtime}" if precision else runtime
        others = [each for each in PRECISIONS if any((o.runtime, o.precision) == (runtime, each) for o in bundle.built)]
        raise EngineError(
            f"{bundle.path} has no {what} engine{' except in ' + ', '.join(others) if others else ''}: export it with "
            f"--precision {precision or FASTEST[0]} --target {runtime}."
        )
    return found


def choose(offered: Mapping[str, Mapping[str, CompiledEngine]], runtime: str, version: str) -> str:
    """The first precision whose engines are for this machine; asked before anything is loaded.

    Raises:
        EngineError: why the first of them cannot run here.
    """
    if not hardware.gpu():
        raise EngineError(f"{runtime} needs an NVIDIA GPU, and the CUDA driver finds none.")
    refused = []
    for precision, graphs in offered.items():
        try:
            for built in graphs.values():
                check_built(built, version)
        except EngineError as error:
            log.info("%s", error)
            refused.append(error)
        else:
            return precision
    raise refused[0]


def check_built(built: CompiledEngine, version: str) -> None:
    """Check that an engine is for this version and GPU.

    Raises:
        EngineError: when it is not.
    """
    if built.version != version:
        raise EngineError(
            f"{built.file} was built by {built.runtime} {built.version}, and {version} is installed: export the bundle "
            "again, or install the version that built it."
        )
    here = hardware.gpu()
    if here not in built.hardware.split("+"):
        way = f"with --compute-capability {here[2:-1]}.{here[-1]}" if built.runtime == "tensorrt-rtx" else "here"
        raise EngineError(
            f"{built.file} was built for {built.hardware.replace('+', ' and ')}, and this GPU is {here}: export the "
            f"bundle again {way}."
        )
