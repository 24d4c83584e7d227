"""Memory, streams and captured graphs of the first CUDA device, on NVIDIA's Python bindings."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import EngineError


def runtime() -> Any:
    """`cuda.bindings.runtime`, imported on first use.

    Raises:
        EngineError: when it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError("cuda-bindings is not installed: run pip install 'cuda-bindings>=12.8'.") from error
    return runtime


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call, which CUDA returns after an error code.

    Raises:
        EngineError: with CUDA's message.
    """
    error, *values = result
    if int(error):
        message = runtime().cudaGetErrorString(error)[1]
        text = message.decode() if isinstance(message, bytes) else message
        raise EngineError(f"CUDA failed: {text} ({int(error)}).")
    return values[0] if values else None


class DeviceMemory:
    """Device memory, freed with the object."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self.address = int(checked(runtime().cudaMalloc(self.size)))
        _free_with(self, runtime().cudaFree, self.address)


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array in pinned host memory, for asynchronous copies; freed with its last view."""
    size = math.prod(shape) * dtype.itemsize
    address = int(checked(runtime().cudaMallocHost(max(size, 1))))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    _free_with(buffer, runtime().cudaFreeHost, address)
    return np.frombuffer(memoryview(buffer), dtype).reshape(shape)


def _check_copy(array: NDArray[Any], device: DeviceMemory) -> None:
    """No `assert`, which `python -O` drops: CUDA would write past the end."""
    if not array.flags.c_contiguous or array.nbytes > device.size:
        raise EngineError(f"cannot copy {array.nbytes} bytes: expected a contiguous array of at most {device.size}.")


class CudaStream:
    """A CUDA stream; every method but `wait` returns before the work is done."""

    def __init__(self) -> None:
        cuda = runtime()
        self.handle = checked(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        _free_with(self, cuda.cudaStreamDestroy, self.handle)

    def upload(self, source: NDArray[Any], target: DeviceMemory) -> None:
        """Copy a pinned array to the start of `target`.

        Raises:
            EngineError: when the copy would not fit.
        """
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        _check_copy(source, target)
        checked(runtime().cudaMemcpyAsync(target.address, source.ctypes.data, source.nbytes, kind, self.handle))

    def download(self, source: DeviceMemory, target: NDArray[Any]) -> None:
        """Fill a pinned array from the start of `source`.

        Raises:
            EngineError: when `source` holds less.
        """
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _check_copy(target, source)
        checked(runtime().cudaMemcpyAsync(target.ctypes.data, source.address, target.nbytes, kind, self.handle))

    def wait(self) -> None:
        """Wait until all queued work is done."""
        checked(runtime().cudaStreamSynchronize(self.handle))

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """Capture what `enqueue` queues on this stream as a graph, without running it.

        Raises:
            EngineError: when it cannot be captured; the stream stays usable.
        """
        cuda = runtime()
        # Thread-local: other threads, with torch in them, may allocate meanwhile.
        checked(cuda.cudaStreamBeginCapture(self.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            enqueue()
        except BaseException:
            self._end_capture()
            raise
        graph = checked(self._end_capture())
        try:
            return CapturedGraph(checked(cuda.cudaGraphInstantiate(graph, 0)))
        finally:
            cuda.cudaGraphDestroy(graph)

    def launch(self, graph: CapturedGraph) -> None:
        """Queue a captured graph."""
        checked(runtime().cudaGraphLaunch(graph.handle, self.handle))

    def _end_capture(self) -> tuple[Any, ...]:
        result: tuple[Any, ...] = runtime().cudaStreamEndCapture(self.handle)
        if int(result[0]):
            runtime().cudaGetLastError()  # or the next CUDA call would report it
        return result


class CapturedGraph:
    """An instantiated CUDA graph."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        _free_with(self, runtime().cudaGraphExecDestroy, handle)


def _free_with(owner: object, free: Callable[[Any], object], resource: Any) -> None:
    """Free a resource with its owner, but not at exit: then the driver frees everything, and may be gone already."""
    weakref.finalize(owner, free, resource).atexit = False
