"""What an engine is, and the one function that opens one.

An engine knows arrays. It knows nothing of images, files, HTTP, labels or queues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.errors import EngineError

Arrays = dict[str, NDArray[Any]]

ENGINES = ("onnx", "torch")


class Engine(Protocol):
    """One runtime with one bundle loaded; may be called from several threads."""

    bundle: Bundle
    name: str  # runtime and device, such as "onnx-cpu"

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run a graph and return the chosen outputs, one row an item of the batch.

        `encoder`: `pixels` float32 (B, 3, size, size), normalised; gives `embedding` (B, D), `stage1` to `stage4`
        (B, D, H, W) and, with a head, `logits` (B, classes), all float32.
        `reconstruct`: `image_a` and `image_b` as `pixels`, `from_partner` bool (B, units); gives `mixed`,
        `reconstruction_a` and `reconstruction_b`, as `pixels`.

        Raises:
            BundleError: when the bundle has no such graph.
            EngineError: for inputs or outputs that the graph does not have.
        """
        ...


def open_engine(bundle: Bundle | Path, kind: str = "onnx", threads: int = 0) -> Engine:
    """Verify a bundle and load it into a runtime; `threads` 0 takes every core.

    Raises:
        BundleError: when the bundle is incomplete or altered.
        EngineError: when the runtime is unknown or not installed, or refuses the bundle.
    """
    if isinstance(bundle, Path):
        bundle = open_bundle(bundle)
    bundle.verify()
    if kind == "onnx":
        from mixmim_serve.engines.onnx import OnnxEngine

        return OnnxEngine(bundle, threads)
    if kind == "torch":
        from mixmim_serve.engines.torch import TorchEngine

        return TorchEngine(bundle, threads)
    raise EngineError(f"unknown engine {kind!r}: choose one of {', '.join(ENGINES)}.")


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
    bundle.graph_path(graph)
    unknown = [name for name in outputs if name not in bundle.graphs[graph]]
    if unknown or not outputs:
        raise EngineError(f"the {graph} graph gives {', '.join(bundle.graphs[graph])}; asked for {unknown or 'none'}.")
    if inputs.keys() != expected.keys():
        raise EngineError(f"the {graph} graph takes {', '.join(expected)}; got {', '.join(inputs) or 'nothing'}.")
    batches = {array.shape[:1] for array in inputs.values()}
    for name, array in inputs.items():
        if array.shape[1:] != expected[name] or len(batches) != 1:
            raise EngineError(
                f"{name} must be (batch, {', '.join(map(str, expected[name]))}) with one batch for all inputs; "
                f"got {array.shape}."
            )


def graph_inputs(bundle: Bundle, graph: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs, the batch left out."""
    size = bundle.arch.image_size
    if graph == "encoder":
        return {"pixels": (3, size, size)}
    return {"image_a": (3, size, size), "image_b": (3, size, size), "from_partner": (bundle.arch.units,)}


def as_input(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array in the type that graphs take: bool for the mask, float32 for pixels, without a copy where it is one."""
    return np.ascontiguousarray(array, dtype=np.bool_ if name == "from_partner" else np.float32)
