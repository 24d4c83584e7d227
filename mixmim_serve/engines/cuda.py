"""Memory, a stream and captured graphs of the first CUDA device: what an engine needs of NVIDIA's bindings."""

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
    """`cuda.bindings.runtime`, imported when it is first needed.

    Raises:
        EngineError: when it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError("cuda-bindings is not installed: run pip install 'cuda-bindings>=12.8'.") from error
    return runtime


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call, which returns it behind an error code.

    Raises:
        EngineError: with CUDA's own words.
    """
    error, *values = result
    if int(error):
        words = runtime().cudaGetErrorString(error)[1]
        raise EngineError(f"CUDA failed: {words.decode() if isinstance(words, bytes) else words} ({int(error)}).")
    return values[0] if values else None


class DeviceMemory:
    """Bytes on the device, given back when the object goes."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self.address = int(checked(runtime().cudaMalloc(self.size)))
        _when_gone(self, runtime().cudaFree, self.address)


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that the device copies from and to while the CPU goes on; given back with its last view."""
    size = math.prod(shape) * dtype.itemsize
    address = int(checked(runtime().cudaMallocHost(max(size, 1))))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    _when_gone(buffer, runtime().cudaFreeHost, address)
    return np.frombuffer(memoryview(buffer), dtype).reshape(shape)


class Stream:
    """One queue of work; everything but `wait` returns before it is done."""

    def __init__(self) -> None:
        cuda = runtime()
        self.handle = checked(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        _when_gone(self, cuda.cudaStreamDestroy, self.handle)

    def upload(self, source: NDArray[Any], target: DeviceMemory) -> None:
        """Copy a pinned array to the start of `target`."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        assert source.flags.c_contiguous and source.nbytes <= target.size  # noqa: S101, PT018 - ours to get right
        checked(runtime().cudaMemcpyAsync(target.address, source.ctypes.data, source.nbytes, kind, self.handle))

    def download(self, source: DeviceMemory, target: NDArray[Any]) -> None:
        """Fill a pinned array from the start of `source`."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        assert target.flags.c_contiguous and target.nbytes <= source.size  # noqa: S101, PT018
        checked(runtime().cudaMemcpyAsync(target.ctypes.data, source.address, target.nbytes, kind, self.handle))

    def wait(self) -> None:
        """Until all that was queued is done."""
        checked(runtime().cudaStreamSynchronize(self.handle))

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """What `enqueue` queues on this stream, as one graph; nothing of it runs.

        Raises:
            EngineError: when it cannot be captured; the stream can be used as before.
        """
        cuda = runtime()
        # Of this thread alone: other threads, and torch in them, may allocate meanwhile.
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
            runtime().cudaGetLastError()  # or the next call of anybody would report it
        return result


class CapturedGraph:
    """Work that is queued as one."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        _when_gone(self, runtime().cudaGraphExecDestroy, handle)


def _when_gone(owner: object, give_back: Callable[[Any], object], what: Any) -> None:
    """Not at the end of the process, when the driver may be gone already and takes back everything anyway."""
    weakref.finalize(owner, give_back, what).atexit = False
