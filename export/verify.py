"""Does a runtime give torch's numbers on real photos? An export that disagrees is never written."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle
from mixmim_serve.config import Preprocessing
from mixmim_serve.engines.base import Arrays, Engine, graph_inputs
from mixmim_serve.errors import BundleError
from mixmim_serve.preprocess import preprocess

# Largest absolute difference from torch for a float32 graph. Measured between ONNX Runtime and torch: 1e-6 to 2e-5;
# a wrong constant or operator moves outputs by 1e-2 or more.
TOLERANCE = 1e-4


def photos(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The CC0 photos that come with this package, preprocessed: float32 (4, 3, size, size)."""
    folder = files("export") / "photos"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".jpg")), key=lambda path: path.name)
    return np.stack([preprocess(path.read_bytes(), preprocessing) for path in paths])


def compare(bundle: Bundle, golden: Arrays, engine: Engine) -> dict[str, float]:
    """Largest absolute difference of each output from its golden array, in a batch of all photos and of one.

    Raises:
        BundleError: when one of them is above the tolerance, or not a number.
    """
    differences: dict[str, float] = {}
    for graph, outputs in bundle.graphs.items():
        for rows in (slice(None), slice(0, 1)):
            inputs = {name: golden[f"{graph}.{name}"][rows] for name in graph_inputs(bundle, graph)}
            results = engine.run(graph, inputs, outputs)
            for name in outputs:
                key = f"{graph}.{name}"
                with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and refused below
                    difference = float(np.abs(results[name] - golden[key][rows]).max())
                differences[key] = float(np.maximum(differences.get(key, 0.0), difference))  # keeps a NaN
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise BundleError(
                f"{engine.name} differs from torch by {difference:.2g} in {name}, above {TOLERANCE:g}: "
                "the bundle was not written; try another version of torch or ONNX Runtime."
            )
    return differences
