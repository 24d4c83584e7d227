"""TensorRT engines, compiled ahead of time from a bundle's weights.

TensorRT-RTX compiles for named compute capabilities, even on machines without a GPU. Networks are strongly typed (the
only kind in TensorRT 11): the precision is the graph's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mixmim_serve.config import unknown
from mixmim_serve.engines import hardware
from mixmim_serve.engines.tensorrt_library import MODULES, load, logger
from mixmim_serve.errors import BundleError, ConfigError
from mixmim_serve.files import atomic_path

OnStep = Callable[[str], None]  # called with the name of each step


@dataclass(frozen=True)
class EngineOptions:
    """How engines are compiled."""

    runtime: str = "tensorrt"  # or tensorrt-rtx
    batches: tuple[int, int, int] = (1, 8, 32)  # smallest, tuned for, largest
    capabilities: tuple[str, ...] = ()  # such as "8.9", for TensorRT-RTX; () for the GPU of this machine
    timing_cache: Path | None = None  # read if it exists, and written: makes the next build faster

    def __post_init__(self) -> None:
        if self.runtime not in MODULES:
            raise unknown("runtime", self.runtime, MODULES)
        if not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            raise ConfigError(f"batches must be three rising numbers (min, opt, max), got {list(self.batches)}.")


@dataclass(frozen=True)
class EnginePlan:
    """A serialised engine, and where it runs."""

    plan: bytes
    version: str  # of TensorRT
    hardware: str  # "sm89", several joined by "+", or the GPU of this machine


def build_engine(graph: Path, options: EngineOptions, progress: OnStep = lambda _: None) -> EnginePlan:
    """Compile an ONNX graph with a dynamic batch; `progress` receives TensorRT's names of the phases.

    Raises:
        EngineError: when the runtime is not installed.
        BundleError: when it does not support the hardware or the graph.
    """
    trt = load(options.runtime)
    capabilities = capability_values(trt, options)
    log = logger(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise BundleError(f"{_name(trt, options)} cannot read {graph.name}: {_first_error(parser, log)}")
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, options.batches))
    config.progress_monitor = _monitor(trt, progress)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 must stay float32: TF32 rounds to 10 bits, like fp16
    if options.runtime == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # needed to capture a CUDA graph
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for number, value in enumerate(capabilities.values()):
            config.set_compute_capability(value, number)
    cache = _timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"{_name(trt, options)} cannot build {graph.name}: {log.reason()}")
    if cache is not None and options.timing_cache:
        with atomic_path(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return EnginePlan(bytes(plan), str(trt.__version__), "+".join(capabilities) or hardware.gpu())


def capability_values(trt: ModuleType, options: EngineOptions) -> dict[str, Any]:
    """TensorRT-RTX's values of the requested compute capabilities, by name ("sm89"); {} for the GPU of this machine.

    Raises:
        BundleError: for an unsupported one, listing those supported; or for none on a machine without a GPU.
    """
    if options.runtime == "tensorrt" and options.capabilities:
        raise BundleError("tensorrt builds for the GPU it runs on: --compute-capability is for tensorrt-rtx only.")
    if not options.capabilities:
        if not hardware.gpu():
            advice = (
                "name one with --compute-capability"
                if options.runtime == "tensorrt-rtx"
                else "export on a machine with one"
            )
            raise BundleError(f"{options.runtime} found no GPU to build for: {advice}.")
        return {}
    members = trt.ComputeCapability.__members__.items()
    supported = {name.lower(): value for name, value in members if name.startswith("SM")}
    values = {}
    for requested in options.capabilities:
        name = f"sm{requested.lower().removeprefix('sm').replace('.', '')}"
        if name not in supported:
            raise BundleError(
                f"{_name(trt, options)} cannot build for compute capability {requested}: choose one of "
                f"{', '.join(f'{name[2:-1]}.{name[-1]}' for name in supported)}."
            )
        values[name] = supported[name]
    return values


def _profile(builder: Any, network: Any, batches: Sequence[int]) -> Any:
    """A profile in which only the batch size varies, the same for every input."""
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        profile.set_shape(tensor.name, *((batch, *tuple(tensor.shape)[1:]) for batch in batches))
    return profile


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX times kernels where they run, not here
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        fits = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    if not fits:
        raise BundleError(f"{path} is a timing cache of another TensorRT version or GPU: give another file.")
    return cache


def _monitor(trt: ModuleType, progress: OnStep) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Reports each outermost phase and its steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                progress(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                progress(f"{phase_name}: {step + 1} of {self.steps[phase_name]}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _first_error(parser: Any, log: Any) -> str:
    return hardware.first_line(parser.get_error(0).desc()) if parser.num_errors else str(log.reason())


def _name(trt: ModuleType, options: EngineOptions) -> str:
    return f"{options.runtime} {trt.__version__}"
