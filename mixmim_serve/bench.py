"""Speed and accuracy of each engine with a bundle on this machine: what `mixmim bench` measures.

Each engine and precision runs in a process of its own, so that memory and threads are its own. They take turns for
`rounds` rounds, because machines are shared and their speed drifts. The best round counts.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.config import PATCH_SIZE, STAGES, Architecture
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.base import largest_batch
from mixmim_serve.engines.certificate import certify
from mixmim_serve.engines.hardware import gpu_memory_used, gpu_name, has_cuda_device, processor
from mixmim_serve.errors import EngineError, MixMIMError
from mixmim_serve.version import __version__

ON_CPU = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("torch", "fp32"),
    ("torch", "bf16"),
)
ON_GPU = (
    ("tensorrt", "fp16"),
    ("tensorrt-rtx", "fp16"),
    ("onnx", "fp16"),
    ("onnx", "fp32"),
    ("torch", "bf16"),
    ("torch", "fp32"),
    ("openvino", "bf16"),  # on the same machine's CPU
)
BATCHES = (1, 8, 32)
MATRIX, MATRIX_ON_GPU = 2048, 8192  # side of the square matrices whose product gives the machine's rate


@dataclass(frozen=True)
class Row:
    """The measurements of one engine, precision and batch size."""

    engine: str
    precision: str
    batch: int
    images_per_second: float
    p50: float  # milliseconds per call
    p99: float
    memory: float  # MB, peak of the process
    load: float  # seconds from opening the bundle to the first output
    cosine: float  # lowest of all outputs, with torch in float32
    error: float  # as in `mixmim_serve.engines.certificate`
    share: float | None  # of the device's rate for matrix products in this precision; None if unknown
    gpu_memory: float | None = None  # MB of GPU memory that the engine took; None without a GPU


@dataclass(frozen=True)
class Report:
    """The result of `mixmim bench`."""

    rows: tuple[Row, ...]
    missing: dict[str, str]  # engine and precision: why it does not run
    rates: dict[str, float]  # TFLOP/s of matrix products, by device and precision, such as "cuda fp16"
    about: dict[str, Any]  # bundle, hardware, versions, settings


def bench(
    path: Path,
    contenders: Sequence[tuple[str, str]] = (),
    batches: Sequence[int] = BATCHES,
    seconds: float = 3.0,
    rounds: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure each contender (engine, precision) that runs here; by default those for this machine.

    Raises:
        BundleError: when the bundle is incomplete or altered.
        EngineError: when no engine runs.
    """
    bundle = open_bundle(path)
    bundle.verify()
    collected = _Collected()
    for number in range(rounds):
        for device, precision in _rates_to_measure():
            progress(f"round {number + 1} of {rounds}: matrix products, {device} {precision}")
            collected.measure_rate(device, precision)
        for kind, precision in contenders or (ON_GPU if has_cuda_device() else ON_CPU):
            if f"{kind} {precision}" not in collected.missing:
                progress(f"round {number + 1} of {rounds}: {kind} {precision}")
                collected.measure_engine(path, kind, precision, batches, seconds)
    if not collected.rows:
        raise EngineError("no installed engine can run this bundle. " + " ".join(collected.missing.values()))
    flops = encoder_flops(bundle.arch)
    rows = [_with_share(_best(tries), flops, collected.rates) for tries in collected.rows.values()]
    about = {
        "bundle": path.name, "model": bundle.name, "fingerprint": bundle.fingerprint,
        "model_fingerprint": bundle.fingerprint, "image_size": bundle.arch.image_size,
        "gflop_an_image": round(flops / 1e9, 2), "hardware": gpu_name() or processor(),
        "processor": processor(), "mixmim-serve": __version__,
        "engines": collected.versions, "seconds": seconds, "rounds": rounds, "files_mb": _sizes(bundle),
    }  # fmt: skip
    return Report(tuple(rows), collected.missing, collected.rates, about)


@dataclass
class _Collected:
    """The measurements of all rounds so far."""

    rows: dict[tuple[str, str, int], list[Row]] = field(default_factory=dict)  # by engine, precision, batch
    missing: dict[str, str] = field(default_factory=dict)  # as in `Report`
    rates: dict[str, float] = field(default_factory=dict)  # as in `Report`, of the best round
    versions: dict[str, str] = field(default_factory=dict)  # of each engine

    def measure_rate(self, device: str, precision: str) -> None:
        rate = _in_process(["rate", device, precision]).get("rate")
        if rate:
            name = f"{device} {precision}"
            self.rates[name] = max(rate, self.rates.get(name, 0.0))

    def measure_engine(self, path: Path, kind: str, precision: str, batches: Sequence[int], seconds: float) -> None:
        answer = _in_process(["engine", str(path), kind, precision, json.dumps(list(batches)), str(seconds)])
        if "error" in answer:  # without the folder: reports are passed on
            self.missing[f"{kind} {precision}"] = answer["error"].replace(str(path), path.name)
            return
        self.versions[answer["engine"]] = answer["version"]
        for values in answer["rows"]:
            row = Row(**values)
            self.rows.setdefault((kind, precision, row.batch), []).append(row)


def encoder_flops(arch: Architecture) -> float:
    """Floating-point operations of the matrix products for one image; a multiply-add counts as two."""
    macs = float(arch.grids[0] ** 2 * 3 * PATCH_SIZE**2 * arch.embed_dim)
    windows = arch.windows or arch.grids
    for stage, (depth, dim, grid, window) in enumerate(zip(arch.depths, arch.dims, arch.grids, windows, strict=True)):
        mlp = 2 * arch.facts.mlp_ratios[stage] * grid**2 * dim**2
        macs += depth * (arch.facts.attention_macs(grid, window, dim, arch.units) + mlp)
        if stage < STAGES - 1:
            macs += (grid // 2) ** 2 * (4 * dim) * arch.dims[stage + 1]
    return 2 * macs


def _rates_to_measure() -> list[tuple[str, str]]:
    on_gpu = [("cuda", precision) for precision in ("fp16", "bf16", "fp32")] if has_cuda_device() else []
    return [*on_gpu, ("cpu", "fp32"), ("cpu", "bf16")]


def _best(tries: list[Row]) -> Row:
    """The fastest round, with the peak memory and the shortest load time of all rounds."""
    best = max(tries, key=lambda row: row.images_per_second)
    on_gpu = [row.gpu_memory for row in tries if row.gpu_memory is not None]
    return dataclasses.replace(
        best,
        memory=max(row.memory for row in tries),
        gpu_memory=max(on_gpu, default=None),
        load=min(row.load for row in tries),
    )


def _with_share(row: Row, flops: float, rates: dict[str, float]) -> Row:
    rate = rates.get(f"{row.engine.rpartition('-')[2]} {row.precision}")
    return dataclasses.replace(row, share=row.images_per_second * flops / (rate * 1e12)) if rate else row


def _sizes(bundle: Bundle) -> dict[str, float]:
    return {name: round((bundle.path / name).stat().st_size / 1e6, 2) for name in bundle.checksums}


def _in_process(arguments: list[str]) -> dict[str, Any]:
    """Run `_main` in a process of its own; returns the JSON object on the last line of its output."""
    ended = subprocess.run(  # noqa: S603 - this module, with our own arguments
        [sys.executable, "-m", "mixmim_serve.bench", *arguments], capture_output=True, text=True
    )
    try:
        answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": (ended.stderr.strip().splitlines() or [f"exited with status {ended.returncode}"])[-1]}
    return answer


def measure_engine(path: Path, kind: str, precision: str, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """Measure one engine with all batch sizes; to be called in a process of its own."""
    import resource

    started, gpu_before = time.perf_counter(), gpu_memory_used()
    engine = open_engine(path, kind, precision)
    size = engine.bundle.arch.image_size
    noise = np.random.default_rng(0).integers(0, 256, (max(batches), size, size, 3), np.uint8)
    engine.run("encoder", {"pixels": noise[:1]}, ["embedding"])
    load = time.perf_counter() - started
    certificate = certify(engine)
    rows = []
    for batch in batches:
        if batch > largest_batch(engine, batch):
            continue
        calls = list(_times(partial(engine.run, "encoder", {"pixels": noise[:batch]}, ["embedding"]), seconds))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        row = Row(
            engine.name,
            engine.precision,
            batch,
            images_per_second=batch / float(np.median(calls)),
            p50=float(np.median(calls)) * 1e3,
            p99=float(np.quantile(calls, 0.99)) * 1e3,
            memory=memory,
            load=load,
            cosine=certificate.cosine,
            error=certificate.error,
            share=None,
            gpu_memory=_gpu_memory_since(gpu_before) if engine.name.endswith("-cuda") else None,
        )
        rows.append(dataclasses.asdict(row))
    return {"engine": engine.name, "version": engine.version, "rows": rows}


def _gpu_memory_since(before: float | None) -> float | None:
    now = gpu_memory_used()
    return None if now is None or before is None else now - before


def gpu_matrix_rate(precision: str, seconds: float = 1.0) -> float | None:
    """TFLOP/s of square matrix products in torch on the GPU, of the best call; None without torch for CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    left, right = torch.randn(2, MATRIX_ON_GPU, MATRIX_ON_GPU, device="cuda", dtype=dtype)

    def multiply() -> None:
        left @ right
        torch.cuda.synchronize()

    return float(2.0 * MATRIX_ON_GPU**3 / min(_times(multiply, seconds)) / 1e12)


def matrix_rate(precision: str, seconds: float = 1.0) -> float | None:
    """TFLOP/s of square matrix products, of the best call of NumPy (fp32) and OpenVINO; None if neither can."""
    values = np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX), np.float32)
    best = []
    if precision == "fp32":
        best.append(min(_times(lambda: values[0] @ values[1], seconds)))
    if request := _openvino_product(values[1], precision):
        best.append(min(_times(lambda: request.infer([values[0]], share_inputs=True), seconds)))
    return 2.0 * MATRIX**3 / min(best) / 1e12 if best else None


def _openvino_product(right: NDArray[np.float32], precision: str) -> Any:
    """A request that multiplies by a matrix; None without OpenVINO or CPU support for the precision."""
    try:
        from openvino import Model, opset13, properties

        from mixmim_serve.engines.openvino import TYPES, core, has_bf16
    except (ImportError, EngineError):
        return None
    if precision == "bf16" and not has_bf16():
        return None
    left = opset13.parameter(list(right.shape), np.float32)
    model = Model([opset13.matmul(left, opset13.constant(right), False, False)], [left])
    settings = {properties.hint.inference_precision: TYPES[precision]}
    return core().compile_model(model, "CPU", settings).create_infer_request()


def _times(call: Callable[[], object], seconds: float) -> Iterator[float]:
    """Seconds of each call, after one warm-up call; for `seconds`, and at least five calls."""
    call()
    end, count = time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        count += 1
        yield time.perf_counter() - started


def _main(arguments: list[str]) -> None:
    """Entry point of the process that `_in_process` starts."""
    try:
        if arguments[0] == "rate":
            measure = gpu_matrix_rate if arguments[1] == "cuda" else matrix_rate
            answer: dict[str, Any] = {"rate": measure(arguments[2])}
        else:
            path, kind, precision, batches, seconds = arguments[1:]
            answer = measure_engine(Path(path), kind, precision, json.loads(batches), float(seconds))
    except MixMIMError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    _main(sys.argv[1:])
