"""ONNX Runtime on the CPU, or on a CUDA device if onnxruntime-gpu finds one; on request with TensorRT inside."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import CACHE, Bundle
from mixmim_serve.cores import physical_cores
from mixmim_serve.engines.base import Arrays, best_precision, check_request, graph_inputs
from mixmim_serve.engines.buckets import BUCKETS, run_in_buckets
from mixmim_serve.engines.hardware import first_line, gpu_name, has_cuda_device, processor
from mixmim_serve.errors import EngineError

try:
    import onnxruntime
except ImportError as error:
    raise EngineError(
        "ONNX Runtime is not installed: run pip install 'mixmim-serve[cpu]' (or [gpu], never both)."
    ) from error

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


class OnnxEngine:
    """One session per graph, opened when the graph is first run."""

    version: str = onnxruntime.__version__
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, precision: str = "", threads: int = 0) -> None:
        _refuse_both_packages()
        self.bundle = bundle
        self.provider = self._provider()
        self.device = "cpu" if self.provider == CPU else "cuda"
        names = {CPU: "onnx-cpu", CUDA: "onnx-cuda", TENSORRT: "onnx-tensorrt-cuda"}
        self.name, self.hardware = names[self.provider], gpu_name() if self.device == "cuda" else processor()
        order = ("fp32", "fp16") if self.device == "cpu" else ("fp16", "fp32")
        self.precision = precision or best_precision(bundle, order)
        self._threads = threads or physical_cores()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bound: dict[str, BoundSession] = {}
        self._opening, self._running = threading.Lock(), threading.Lock()
        self._session("encoder")

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """See `Engine.run`."""
        check_request(self.bundle, graph, graph_inputs(self.bundle, graph), inputs, outputs)
        session = self._session(graph)
        try:
            if self.device == "cpu":  # buckets improve neither memory nor speed (docs/engines.md)
                feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
                return dict(zip(outputs, session.run(list(outputs), feed), strict=True))
            with self._running:  # a bound session owns its input and output memory
                if graph not in self._bound:
                    self._bound[graph] = BoundSession(session, self.device)
                return run_in_buckets(functools.partial(self._bound[graph].run, outputs=outputs), inputs)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime failed on the {graph} graph: {first_line(error)}") from error

    def _provider(self) -> str:
        """CUDA if the driver finds a GPU and the package supports it, else the CPU."""
        usable = has_cuda_device() and CUDA in onnxruntime.get_available_providers()
        return CUDA if usable else CPU

    def _session(self, graph: str) -> onnxruntime.InferenceSession:
        with self._opening:
            if graph not in self._sessions:
                self._sessions[graph] = self._open(graph)
            return self._sessions[graph]

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        path = self.bundle.graph_path(graph, self.precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Waiting threads that spin take cores from the threads that decode images (docs/engines.md).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if self.device == "cuda":
            _preload_cuda()
        try:
            session = onnxruntime.InferenceSession(path, options, providers=self._providers(graph), enable_fallback=0)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {first_line(error)}"
            ) from error
        if self.provider not in session.get_providers():  # ONNX Runtime only warns, and falls back
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load its {self.provider}: {_ADVICE[self.provider]}"
            )
        return session

    def _providers(self, graph: str) -> list[tuple[str, dict[str, Any]]]:
        """Execution providers with options, in order of preference; `graph` matters to those that compile."""
        cuda = {
            "use_tf32": "0",  # keep float32 exact: TF32 rounds to 10 bits, like fp16
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm for each batch size
        }
        options: dict[str, dict[str, Any]] = {CPU: {}, CUDA: cuda}
        wanted = [CPU] if self.device == "cpu" else [CUDA, CPU]
        return [(name, options[name]) for name in wanted]


class OnnxTensorRtEngine(OnnxEngine):
    """TensorRT as ONNX Runtime's execution provider. It compiles when opened, which takes minutes the first time.

    Compiled engines are stored in the bundle's folder `cache` if it is writable.
    """

    def _provider(self) -> str:
        if not has_cuda_device():
            raise EngineError(
                "onnx-tensorrt needs an NVIDIA GPU, but the CUDA driver finds none: choose another engine."
            )
        if TENSORRT not in onnxruntime.get_available_providers():
            raise EngineError("this ONNX Runtime lacks TensorRT: run pip install 'mixmim-serve[gpu]' (without [cpu]).")
        return TENSORRT

    def _providers(self, graph: str) -> list[tuple[str, dict[str, Any]]]:
        compiled: dict[str, Any] = {
            "trt_fp16_enable": self.precision == "fp16",
            "trt_bf16_enable": self.precision == "bf16",
            "trt_layer_norm_fp32_fallback": True,
            **self._profile(graph),
            **cache_options(self.bundle.path / CACHE / "onnx-tensorrt"),
        }
        return [(TENSORRT, compiled), *super()._providers(graph)]

    def _profile(self, graph: str) -> dict[str, str]:
        """Batch sizes to compile for: all buckets at once, else each larger batch would be compiled separately."""
        shapes = graph_inputs(self.bundle, graph)
        batches = {"min": BUCKETS[0], "opt": 8, "max": BUCKETS[-1]}
        return {
            f"trt_profile_{name}_shapes": ",".join(
                f"{key}:{'x'.join(map(str, (batch, *shape)))}" for key, shape in shapes.items()
            )
            for name, batch in batches.items()
        }


class BoundSession:
    """A session with its own device memory, kept from call to call for each batch size."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self.session, self.device = session, device
        self.rows = {output.name: tuple(output.shape[1:]) for output in session.get_outputs()}
        self.values: dict[tuple[str, int], onnxruntime.OrtValue] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run one batch, with one copy to the device per input and one back per requested output."""
        binding = self.session.io_binding()
        batch = len(next(iter(inputs.values())))
        for name, array in inputs.items():
            value = self._value(name, array.shape, array.dtype)
            value.update_inplace(array)
            binding.bind_ortvalue_input(name, value)
        results = {name: self._value(name, (batch, *self.rows[name]), np.dtype(np.float32)) for name in outputs}
        for name, value in results.items():
            binding.bind_ortvalue_output(name, value)
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {name: self._on_host(value) for name, value in results.items()}

    def _value(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> onnxruntime.OrtValue:
        key = name, shape[0]
        if key not in self.values:
            self.values[key] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)
        return self.values[key]

    def _on_host(self, value: onnxruntime.OrtValue) -> NDArray[Any]:
        array: NDArray[Any] = value.numpy()
        if self.device == "cpu":
            return array.copy()  # a view, which the next call overwrites
        return array


def cache_options(folder: Path) -> dict[str, Any]:
    """Options that make TensorRT store compiled engines in a folder; none if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
    }


_ADVICE = {
    CPU: "reinstall it.",
    CUDA: "run pip install 'mixmim-serve[gpu]', which has CUDA's libraries, or hide the GPU (CUDA_VISIBLE_DEVICES=).",
    TENSORRT: "it needs the libraries of TensorRT 10 (pip install 'tensorrt-cu13<11') on LD_LIBRARY_PATH.",
}


@functools.cache
def _preload_cuda() -> None:
    """Load CUDA's libraries from the packages of the extra `gpu`; the system's are found anyway."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        onnxruntime.preload_dlls()


def _refuse_both_packages() -> None:
    """Both packages install the same files: with both, which one runs is undefined."""
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
