"""The Engine protocol, and the checks that all engines share.

An engine takes and returns arrays. It knows nothing of images, files, HTTP, labels or queues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle, canonical_json
from mixmim_serve.errors import EngineError

Arrays = dict[str, NDArray[Any]]


class Engine(Protocol):
    """One runtime with one bundle loaded; thread-safe."""

    bundle: Bundle
    name: str  # runtime and device, such as "onnx-cpu"
    precision: str  # of its computations: fp32, fp16 or bf16
    version: str  # of the runtime
    hardware: str  # name of the CPU or GPU that it runs on
    max_batch: int | None  # rows per call, at most; None for any number

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run a graph and return the chosen outputs, one row per row of the inputs.

        `encoder`: `pixels` uint8 (B, size, size, 3) from `preprocess` (the graph normalises); returns `embedding`
        (B, D), `stage1` to `stage4` (B, D, H, W) and, with a head, `logits` (B, classes), all float32.
        `reconstruct`: `image_a` and `image_b` like `pixels`, `from_partner` bool (B, units); returns `mixed`,
        `reconstruction_a` and `reconstruction_b`, float32 (B, 3, size, size) in normalised pixel units.

        Raises:
            BundleError: when the bundle has no such graph.
            EngineError: for unknown or malformed inputs, unknown outputs, or more rows than `max_batch`.
        """
        ...


def engine_fingerprint(engine: Engine) -> str:
    """128 bits, in hex, of all that changes the outputs: the model fingerprint, the engine and its precision.

    The runtime's version does not count: releases differ in the rounding of the last bits, as processors do.
    """
    return combined_fingerprint(engine.bundle.fingerprint, engine.name, engine.precision)


def combined_fingerprint(model_fingerprint: str, engine: str, precision: str) -> str:
    """The engine fingerprint of a model in an engine that need not be open."""
    identity = {"bundle": model_fingerprint, "engine": engine, "precision": precision}
    return hashlib.sha256(canonical_json(identity)).hexdigest()[:32]


def identity(engine: Engine) -> dict[str, str]:
    """What every result carries: the model's name, the engine fingerprint (`fingerprint`) and the model fingerprint."""
    return {
        "model": engine.bundle.name,
        "fingerprint": engine_fingerprint(engine),
        "model_fingerprint": engine.bundle.fingerprint,
    }


def check_request(
    bundle: Bundle,
    graph: str,
    expected: Mapping[str, tuple[int, ...]],
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
) -> None:
    """Reject what the graph cannot take or return, with a sentence instead of a runtime's own report.

    Raises:
        BundleError: when the bundle has no such graph.
        EngineError: naming the wrong input or output.
    """
    bundle.require_graph(graph)
    unknown = [name for name in outputs if name not in bundle.graphs[graph]]
    if unknown or not outputs:
        raise EngineError(
            f"the {graph} graph returns {', '.join(bundle.graphs[graph])}; requested: "
            f"{', '.join(unknown) or 'nothing'}."
        )
    if inputs.keys() != expected.keys():
        raise EngineError(f"the {graph} graph takes {', '.join(expected)}; got {', '.join(inputs) or 'nothing'}.")
    batches = {array.shape[:1] for array in inputs.values()}
    if (0,) in batches:
        raise EngineError("the batch is empty: pass at least one row.")
    for name, array in inputs.items():
        if array.dtype != _dtype(name):
            raise EngineError(f"{name} must have dtype {_dtype(name)}; got {array.dtype}.")
        if array.shape[1:] != expected[name] or len(batches) != 1:
            raise EngineError(
                f"{name} must have shape (batch, {', '.join(map(str, expected[name]))}), with the same batch for all "
                f"inputs; got {array.shape}."
            )


def best_precision(bundle: Bundle, order: Sequence[str]) -> str:
    """The first of these that the bundle has graphs for; if it has none, the first, which is then rejected."""
    return next((precision for precision in order if precision in bundle.precisions), order[0])


def largest_batch(engine: Engine, preferred: int) -> int:
    """Rows per call: `preferred`, or fewer if the engine takes fewer."""
    return min(preferred, engine.max_batch or preferred)


def graph_inputs(bundle: Bundle, graph: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs, without the batch dimension."""
    size = bundle.arch.image_size
    if graph == "encoder":
        return {"pixels": (size, size, 3)}
    return {"image_a": (size, size, 3), "image_b": (size, size, 3), "from_partner": (bundle.arch.units,)}


def _dtype(name: str) -> np.dtype[Any]:
    """The dtype of a graph's input: uint8 for images, bool for the mask."""
    return np.dtype(np.bool_ if name == "from_partner" else np.uint8)
