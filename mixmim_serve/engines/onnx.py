"""ONNX Runtime: the CPU, or a CUDA device where onnxruntime-gpu finds one; TensorRT inside it if asked for."""

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
    """A session a graph, opened when the graph is first asked for."""

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
            if self.device == "cpu":  # no buckets: neither memory nor speed gains (docs/engines.md)
                feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
                return dict(zip(outputs, session.run(list(outputs), feed), strict=True))
            with self._running:  # a bound session owns the memory that it reads and writes
                if graph not in self._bound:
                    self._bound[graph] = BoundSession(session, self.device)
                return run_in_buckets(functools.partial(self._bound[graph].run, outputs=outputs), inputs)
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise EngineError(f"ONNX Runtime failed on the {graph} graph: {first_line(error)}") from error

    def _provider(self) -> str:
        """What runs the graphs: a GPU where the driver finds one and the package can use it."""
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
        # Threads that spin while they wait take the cores from those that decode images (docs/engines.md).
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
        if self.provider not in session.get_providers():  # ONNX Runtime says so in a warning, and takes the next one
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load its {self.provider}: {_ADVICE[self.provider]}"
            )
        return session

    def _providers(self, graph: str) -> list[tuple[str, dict[str, Any]]]:
        """In order of preference, with options; `graph` is for those that compile."""
        cuda = {
            "use_tf32": "0",  # float32 is to be float32: TF32 rounds to 10 bits, as fp16 does
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm anew for each batch size
        }
        options: dict[str, dict[str, Any]] = {CPU: {}, CUDA: cuda}
        wanted = [CPU] if self.device == "cpu" else [CUDA, CPU]
        return [(name, options[name]) for name in wanted]


class OnnxTensorRtEngine(OnnxEngine):
    """TensorRT as ONNX Runtime's execution provider: compiles when it is opened, which takes minutes the first time.

    What it compiled is kept in the bundle's folder `cache`, where that can be written to.
    """

    def _provider(self) -> str:
        if not has_cuda_device():
            raise EngineError("onnx-tensorrt needs an NVIDIA GPU, and the CUDA driver finds none.")
        if TENSORRT not in onnxruntime.get_available_providers():
            raise EngineError(
                "this ONNX Runtime knows no TensorRT: run pip install 'mixmim-serve[gpu]' (without [cpu])."
            )
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
        """The batches to compile for, all buckets at once; without it each larger batch would compile anew."""
        shapes = graph_inputs(self.bundle, graph)
        batches = {"min": BUCKETS[0], "opt": 8, "max": BUCKETS[-1]}
        return {
            f"trt_profile_{name}_shapes": ",".join(
                f"{key}:{'x'.join(map(str, (batch, *shape)))}" for key, shape in shapes.items()
            )
            for name, batch in batches.items()
        }


class BoundSession:
    """A session that reads and writes memory of its device; each batch size keeps its own from call to call."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self.session, self.device = session, device
        self.rows = {output.name: tuple(output.shape[1:]) for output in session.get_outputs()}
        self.values: dict[tuple[str, int], onnxruntime.OrtValue] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """One batch; one copy to the device for each input and one back for each output asked for."""
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
            return array.copy()  # it is a view, which the next call alters
        return array


def cache_options(folder: Path) -> dict[str, Any]:
    """Where TensorRT keeps what it compiled; nowhere if the bundle cannot be written to."""
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
    CPU: "install it again.",
    CUDA: "run pip install 'mixmim-serve[gpu]', with CUDA's libraries, or hide the GPU (CUDA_VISIBLE_DEVICES=).",
    TENSORRT: "it wants the libraries of TensorRT 10 (pip install 'tensorrt-cu13<11'), on LD_LIBRARY_PATH.",
}


@functools.cache
def _preload_cuda() -> None:
    """Load CUDA's libraries from the packages that the extra `gpu` brings; those of the system are found anyway."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()


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
