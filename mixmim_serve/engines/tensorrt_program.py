"""A deserialised TensorRT engine with everything that it needs to run: contexts, buffers, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import CACHE, Bundle, CompiledEngine
from mixmim_serve.engines import hardware
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.buckets import bucket_of, buckets_between
from mixmim_serve.engines.cuda import CapturedGraph, CudaStream, DeviceMemory, pinned
from mixmim_serve.engines.tensorrt_library import logger
from mixmim_serve.errors import EngineError
from mixmim_serve.files import atomic_path

log = logging.getLogger(__name__)


class Program:
    """Runs batches up to the largest of the profile; not thread-safe.

    A captured graph is tied to its context, so each bucket has a context of its own. They run one at a time, so they
    share buffers and workspace.

    Raises:
        EngineError: when TensorRT cannot load the engine.
    """

    def __init__(
        self, trt: ModuleType, bundle: Bundle, compiled: CompiledEngine, stream: CudaStream, cuda_graphs: bool
    ) -> None:
        self.trt, self.compiled, self.stream, self.cuda_graphs = trt, compiled, stream, cuda_graphs
        self.log = logger(trt)
        self.runtime = trt.Runtime(self.log)  # must outlive its engine
        self.engine = self._deserialize((bundle.path / compiled.file).read_bytes())
        self.buckets = buckets_between(compiled.batches[0], compiled.batches[2])
        names = [self.engine.get_tensor_name(number) for number in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.rows = {name: tuple(self.engine.get_tensor_shape(name))[1:] for name in names}
        self.dtypes = {name: np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))) for name in names}
        self.device = {name: DeviceMemory(self._bytes(name)) for name in names}
        self.workspace = DeviceMemory(self.engine.device_memory_size_v2)
        self.inputs = tuple(inputs)
        self.host: dict[str, NDArray[Any]] = {}  # pinned; of outputs only the requested ones
        self.ready: dict[int, tuple[Any, CapturedGraph | None]] = {}  # context and CUDA graph of each bucket
        self.cache = RuntimeCache(bundle.path / CACHE / f"{Path(compiled.file).stem}.{hardware.gpu()}.cache")

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run a batch that fits the profile and return the chosen outputs."""
        count = len(inputs[self.inputs[0]])
        size = bucket_of(count, self.buckets)
        for name in self.inputs:
            host = self._host(name)
            host[:count] = inputs[name]
            host[count:size] = inputs[name][-1]  # as in `padded`, without another copy
            self.stream.upload(host[:size], self.device[name])
        if size not in self.ready:
            self.ready[size] = self._prepare(size)
        context, graph = self.ready[size]
        if graph:
            self.stream.launch(graph)
        else:
            self._enqueue(context)
        for name in outputs:
            self.stream.download(self.device[name], self._host(name)[:count])
        self.stream.wait()
        return {name: self._host(name)[:count].copy() for name in outputs}

    def _deserialize(self, plan: bytes) -> Any:
        self.log.errors.clear()
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{self.compiled.runtime} {self.trt.__version__} cannot load {self.compiled.file}: {self.log.reason()}"
            )
        return engine

    def _prepare(self, size: int) -> tuple[Any, CapturedGraph | None]:
        """A context for this batch size, warmed up (TensorRT sets up on the first run), and its CUDA graph."""
        context = self._context()
        context.set_device_memory(self.workspace.address, self.workspace.size)
        for name, memory in self.device.items():
            context.set_tensor_address(name, memory.address)
        for name in self.inputs:
            if not context.set_input_shape(name, (size, *self.rows[name])):
                raise EngineError(f"{self.compiled.file} rejects batches of {size}: {self.log.reason()}")
        self._enqueue(context)
        self.stream.wait()
        if self.cache.store():
            log.info("stored compiled kernels in %s", self.cache.path)
        return context, self._capture(context, size) if self.cuda_graphs else None

    def _context(self) -> Any:
        """An execution context that uses the shared workspace."""
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.compiled.runtime == "tensorrt":
            context = self.engine.create_execution_context(user_managed)
        else:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            # By default it starts with slow generic kernels and replaces them in the background; a captured graph
            # would keep the slow ones.
            strategies = self.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self.cache.use(config)
            context = self.engine.create_execution_context(config)
        if context is None:
            raise EngineError(
                f"{self.compiled.runtime} lacks the memory to run {self.compiled.file}: {self.log.reason()}"
            )
        return context

    def _capture(self, context: Any, size: int) -> CapturedGraph | None:
        handle = int(self.stream.handle)
        try:
            if self.compiled.runtime == "tensorrt-rtx" and not context.is_stream_capturable(handle):
                raise EngineError("TensorRT-RTX cannot capture it.")
            return self.stream.capture(lambda: self._enqueue(context))
        except EngineError as error:
            log.warning("%s runs without a CUDA graph in batches of %d: %s", self.compiled.file, size, error)
            return None

    def _enqueue(self, context: Any) -> None:
        self.log.errors.clear()
        if not context.execute_async_v3(int(self.stream.handle)):
            raise EngineError(f"{self.compiled.runtime} failed on {self.compiled.file}: {self.log.reason()}")

    def _host(self, name: str) -> NDArray[Any]:
        if name not in self.host:
            self.host[name] = pinned((self.buckets[-1], *self.rows[name]), self.dtypes[name])
        return self.host[name]

    def _bytes(self, name: str) -> int:
        """Bytes of a tensor in the largest batch."""
        return int(self.buckets[-1] * np.prod(self.rows[name]) * self.dtypes[name].itemsize)


class RuntimeCache:
    """Stores the kernels that TensorRT-RTX compiles when a shape first runs, if the file can be written.

    TensorRT-RTX itself rejects the file of another version or GPU, and then compiles anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache: Any = None
        self.stored = b""

    def use(self, config: Any) -> None:
        """Make a context use the cache that all contexts share."""
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            try:
                self.stored = self.path.read_bytes()
            except OSError:
                pass  # not stored yet
            else:
                self.cache.deserialize(self.stored)
        config.set_runtime_cache(self.cache)

    def store(self) -> bool:
        """Write the cache if it changed; returns whether it was written."""
        if self.cache is None or (content := bytes(self.cache.serialize())) == self.stored:
            return False
        try:
            self.path.parent.mkdir(exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(content)
        except OSError:
            return False  # a bundle on a read-only disk compiles at every start
        self.stored = content
        return True
