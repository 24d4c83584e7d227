"""A CUDA device and a TensorRT made of NumPy, with the rules of the real ones that an engine can break.

Work on a stream runs when somebody waits for it. Copies need pinned memory on the host and stay inside what was
allocated. A capture records and runs nothing; memory cannot be had and nothing be waited for meanwhile. A graph is tied
to the shapes that its context had. An engine computes what a real engine of ours computes on the arrays that lie at its
addresses.
"""

# ruff: noqa: N802 - names as NVIDIA spells them

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import graph_inputs

OK, OUT_OF_MEMORY, CAPTURING, INVALID = 0, 2, 900, 1


class FakeCuda:
    """Stands for `cuda.bindings.runtime`."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})

    def __init__(self) -> None:
        self.device: dict[int, NDArray[np.uint8]] = {}
        self.host: dict[int, NDArray[np.uint8]] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.next_address = 1 << 44
        self.launches = 0
        self.capture_fails = False

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return OK, {OUT_OF_MEMORY: b"out of memory", CAPTURING: b"operation not permitted"}.get(error, b"invalid")

    def cudaGetLastError(self) -> tuple[int]:
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.captured is not None:
            return CAPTURING, 0
        if size > 1 << 32:
            return OUT_OF_MEMORY, 0
        address, self.next_address = self.next_address, self.next_address + size + 4096
        self.device[address] = np.full(size, 0xAB, np.uint8)
        return OK, address

    def cudaFree(self, address: int) -> tuple[int]:
        del self.device[address]
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        array = np.full(size, 0xCD, np.uint8)
        self.host[array.ctypes.data] = array
        return OK, array.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.host[address]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return OK, 77

    def cudaStreamDestroy(self, handle: int) -> tuple[int]:
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 77
        up = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        into, out = (self.device, self.host) if up else (self.host, self.device)
        to, of = bytes_at(into, target, count), bytes_at(out, source, count)
        return self.enqueue(lambda: np.copyto(to, of))

    def enqueue(self, work: Callable[[], None]) -> tuple[int]:
        (self.queue if self.captured is None else self.captured).append(work)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.captured is not None:
            return (CAPTURING,)
        for work in self.queue:
            work()
        self.queue.clear()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        work, self.captured = self.captured, None
        return (CAPTURING, None) if self.capture_fails else (OK, work)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[int, Any]:
        assert graph
        return OK, tuple(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        return (OK,)

    def cudaGraphLaunch(self, graph: tuple[Callable[[], None], ...], stream: int) -> tuple[int]:
        self.launches += 1
        self.queue.extend(graph)
        return (OK,)


def bytes_at(memory: Mapping[int, NDArray[np.uint8]], address: int, count: int) -> NDArray[np.uint8]:
    """A view of allocated bytes; an assertion fails for any other."""
    for start, array in memory.items():
        if start <= address < start + len(array):
            assert address + count <= start + len(array), "beyond what was allocated"
            return array[address - start : address - start + count]
    raise AssertionError("not memory of this kind")


class FakeTensorRt:
    """Stands for the module `tensorrt` or `tensorrt_rtx`; a plan is the name of a graph of `engine`."""

    __version__ = "9.8.7"
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
    DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER")
    nptype = staticmethod(lambda dtype: dtype)

    class ILogger:
        Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

    def __init__(self, cuda: FakeCuda, engine: Engine, batches: tuple[int, int]) -> None:
        self.cuda, self.engine, self.batches = cuda, engine, batches
        self.contexts: list[FakeContext] = []
        self.capturable = True
        self.compiled: set[str] = set()  # what a runtime cache was told
        self.ran: list[int] = []  # batches, as they ran
        self.given: dict[str, NDArray[Any]] = {}  # inputs of the last of them

    def Runtime(self, log: Any) -> Any:
        def deserialize(plan: bytes) -> FakeEngine | None:
            if plan.decode() not in self.engine.bundle.graphs:
                log.log(self.ILogger.Severity.WARNING, "first a warning")
                log.log(self.ILogger.Severity.ERROR, "the magic tag does not match.\nmore")
                return None
            return FakeEngine(self, plan.decode())

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeEngine:
    """`ICudaEngine`; outputs come in another order than the graph gives them, as TensorRT may do."""

    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTensorRt, graph: str) -> None:
        self.trt, self.graph = trt, graph
        self.inputs = graph_inputs(trt.engine.bundle, graph)
        outputs = trt.engine.bundle.graphs[graph]
        zeros = {name: np.zeros((1, *shape), self.get_tensor_dtype(name)) for name, shape in self.inputs.items()}
        self.rows = {name: array.shape[1:] for name, array in trt.engine.run(graph, zeros, outputs).items()}
        self.names = [*reversed(outputs), *self.inputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *(self.inputs | self.rows)[name])

    def get_tensor_dtype(self, name: str) -> type:
        if name not in self.inputs:
            return np.float32
        return np.bool_ if name == "from_partner" else np.uint8

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cache=None)
        config.create_runtime_cache = lambda: FakeCache(self.trt)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "memory", strategy)
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert how is managed or how.memory is managed
        self.trt.contexts.append(FakeContext(self, how))
        return self.trt.contexts[-1]


class FakeCache:
    """`IRuntimeCache`."""

    def __init__(self, trt: FakeTensorRt) -> None:
        self.trt = trt

    def deserialize(self, content: bytes) -> bool:
        self.trt.compiled.update(content.decode().split())
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.trt.compiled)).encode()


class FakeContext:
    """`IExecutionContext`."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.trt, self.config = engine, engine.trt, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.set_up: dict[str, tuple[int, ...]] = {}
        self.workspace = 0

    def set_device_memory(self, address: int, size: int) -> None:
        bytes_at(self.trt.cuda.device, address, self.engine.device_memory_size_v2)
        self.workspace = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert shape[1:] == self.engine.inputs[name]
        self.shapes[name] = shape
        return self.trt.batches[0] <= shape[0] <= self.trt.batches[1]

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        assert self.workspace
        assert self.addresses.keys() == set(self.engine.names)
        if self.trt.cuda.captured is not None and self.set_up != self.shapes:
            return False  # the first run with a shape allocates
        self.set_up = dict(self.shapes)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if getattr(self.config, "cache", None):
            self.trt.compiled.add(f"{self.engine.graph}-{next(iter(shapes.values()))[0]}")
        self.trt.cuda.enqueue(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        assert shapes == self.shapes, "a graph ran after its context had changed"
        device, engine = self.trt.cuda.device, self.engine
        inputs = {
            name: bytes_at(device, addresses[name], int(np.prod(shape)))
            .view(engine.get_tensor_dtype(name))
            .reshape(shape)
            for name, shape in shapes.items()
        }
        self.trt.ran.append(len(next(iter(inputs.values()))))
        self.trt.given = {name: array.copy() for name, array in inputs.items()}
        results = self.trt.engine.run(engine.graph, self.trt.given, list(engine.rows))
        for name, array in results.items():
            bytes_at(device, addresses[name], array.nbytes)[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def is_pinned(cuda: FakeCuda, array: NDArray[Any]) -> bool:
    """Whether an array lies in pinned memory."""
    return any(start <= array.ctypes.data < start + len(kept) for start, kept in cuda.host.items())
