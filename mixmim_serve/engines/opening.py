"""Open a bundle in a runtime: the one that is named, or the fastest whose numbers agree with torch."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from mixmim_serve.bundle import PRECISIONS, Bundle, open_bundle
from mixmim_serve.engines.base import Engine
from mixmim_serve.engines.certificate import certify
from mixmim_serve.engines.hardware import has_cuda_device
from mixmim_serve.errors import BundleError, EngineError

# Fastest first (docs/engines.md). TensorRT inside ONNX Runtime is missing: it compiles for minutes when it is opened.
_ON_CPU = ("openvino", "onnx", "torch")
_ON_GPU = ("tensorrt", "tensorrt-rtx", "onnx", "torch")
_CLASSES = {
    "onnx": "mixmim_serve.engines.onnx:OnnxEngine",
    "onnx-tensorrt": "mixmim_serve.engines.onnx:OnnxTensorRtEngine",
    "openvino": "mixmim_serve.engines.openvino:OpenVinoEngine",
    "tensorrt": "mixmim_serve.engines.tensorrt:TensorRtEngine",
    "tensorrt-rtx": "mixmim_serve.engines.tensorrt:TensorRtRtxEngine",
    "torch": "mixmim_serve.engines.torch:TorchEngine",
}
ENGINES = tuple(_CLASSES)

log = logging.getLogger(__name__)


def open_engine(bundle: Bundle | Path, kind: str = "auto", precision: str = "", threads: int = 0) -> Engine:
    """Verify a bundle and load it into a runtime.

    `kind` "auto" chooses the fastest installed engine that agrees with torch on the bundle's golden photos
    (`mixmim_serve.engines.certificate`). Without `precision` the engine's fastest is used, with `threads` 0 every core.

    Raises:
        BundleError: when the bundle is incomplete or altered, or lacks the precision.
        EngineError: when the runtime is unknown or not installed, or cannot run the bundle in this precision.
    """
    if isinstance(bundle, Path):
        bundle = open_bundle(bundle)
    check_kind(kind)
    bundle.verify()
    if precision and precision not in PRECISIONS:
        raise EngineError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")
    return _fastest(bundle, precision, threads) if kind == "auto" else _open(bundle, kind, precision, threads)


def check_kind(kind: str) -> None:
    """Check the name of an engine.

    Raises:
        EngineError: for an unknown name, listing the valid ones.
    """
    if kind not in ("auto", *ENGINES):
        raise EngineError(f"unknown engine {kind!r}: choose one of auto, {', '.join(ENGINES)}.")


def _open(bundle: Bundle, kind: str, precision: str, threads: int) -> Engine:
    module, _, name = _CLASSES[kind].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(bundle, precision, threads)
    return engine


def _fastest(bundle: Bundle, precision: str, threads: int) -> Engine:
    """The first engine, in order of preference, that opens and whose certificate is valid."""
    refusals: dict[str, None] = {}  # an ordered set
    # On a machine with a GPU, a package that supports only CPUs must not end the search.
    order = [(kind, True) for kind in _ON_GPU if has_cuda_device()] + [(kind, False) for kind in _ON_CPU]
    for kind, on_gpu in order:
        try:
            engine = _open(bundle, kind, precision, threads)
        except (BundleError, EngineError) as error:
            log.info("engine %s: %s", kind, error)
            refusals[str(error)] = None
            continue
        if on_gpu and engine.name.endswith("-cpu"):
            continue
        try:
            certify(engine).require()
        except EngineError as error:
            log.warning("%s", error)
            refusals[str(error)] = None
        else:
            return engine
    raise EngineError("no installed engine can run this bundle. " + " ".join(refusals))
