"""What an engine is, and the checks that all engines share.

An engine knows arrays. It knows nothing of images, files, HTTP, labels or queues.
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
    """One runtime with one bundle loaded; may be called from several threads."""

    bundle: Bundle
    name: str  # runtime and device, such as "onnx-cpu"
    precision: str  # in which it computes: fp32, fp16 or bf16
    version: str  # of the runtime
    hardware: str  # what it runs on, by name
    max_batch: int | None  # most rows of one call; None for any number

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run a graph and return the chosen outputs, one row an item of the batch.

        `encoder`: `pixels` uint8 (B, size, size, 3) as `preprocess` makes them (the graph normalises); gives
        `embedding` (B, D), `stage1` to `stage4` (B, D, H, W) and, with a head, `logits` (B, classes), all float32.
        `reconstruct`: `image_a` and `image_b` as `pixels`, `from_partner` bool (B, units); gives `mixed`,
        `reconstruction_a` and `reconstruction_b`, float32 (B, 3, size, size) in normalised pixel units.

        Raises:
            BundleError: when the bundle has no such graph.
            EngineError: for inputs or outputs that the graph does not have, or more rows than `max_batch`.
        """
        ...


def engine_fingerprint(engine: Engine) -> str:
    """128 bits that change with anything that changes the numbers: the bundle's, and how this engine computes.

    A runtime's version is left out: releases differ by rounding of the last bits, like processors do.
    """
    about = {"bundle": engine.bundle.fingerprint, "engine": engine.name, "precision": engine.precision}
    return hashlib.sha256(canonical_json(about)).hexdigest()[:32]


def check_request(
    bundle: Bundle,
    graph: str,
    expected: Mapping[str, tuple[int, ...]],
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
) -> None:
    """Refuse what the graph does not take or give, before a runtime answers with a page of its own.

    Raises:
        BundleError: when the bundle has no such graph.
        EngineError: naming the wrong input or output.
    """
    bundle.require_graph(graph)
    unknown = [name for name in outputs if name not in bundle.graphs[graph]]
    if unknown or not outputs:
        raise EngineError(f"the {graph} graph gives {', '.join(bundle.graphs[graph])}; asked for {unknown or 'none'}.")
    if inputs.keys() != expected.keys():
        raise EngineError(f"the {graph} graph takes {', '.join(expected)}; got {', '.join(inputs) or 'nothing'}.")
    batches = {array.shape[:1] for array in inputs.values()}
    if (0,) in batches:
        raise EngineError("the batch is empty: give one row at least.")
    for name, array in inputs.items():
        if array.dtype != _dtype(name):
            raise EngineError(f"{name} must be of type {_dtype(name)}; got {array.dtype}.")
        if array.shape[1:] != expected[name] or len(batches) != 1:
            raise EngineError(
                f"{name} must be (batch, {', '.join(map(str, expected[name]))}) with one batch for all inputs; "
                f"got {array.shape}."
            )


def best_precision(bundle: Bundle, order: Sequence[str]) -> str:
    """The first of these that the bundle has graphs for; if it has none, the first, which is then refused."""
    return next((each for each in order if each in bundle.precisions), order[0])


def largest_batch(engine: Engine, wanted: int) -> int:
    """`wanted` rows, or as many as the engine takes in one call."""
    return min(wanted, engine.max_batch or wanted)


def graph_inputs(bundle: Bundle, graph: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs, the batch left out."""
    size = bundle.arch.image_size
    if graph == "encoder":
        return {"pixels": (size, size, 3)}
    return {"image_a": (size, size, 3), "image_b": (size, size, 3), "from_partner": (bundle.arch.units,)}


def _dtype(name: str) -> np.dtype[Any]:
    """What graphs take: bytes for images, bool for the mask."""
    return np.dtype(np.bool_ if name == "from_partner" else np.uint8)
