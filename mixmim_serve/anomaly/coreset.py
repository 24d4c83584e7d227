"""A coreset: few of many vectors, so that each is near one that was kept.

Greedy k-center as in PatchCore (arXiv 2106.08265, algorithm 1): always keep the vector that is farthest from all that
were kept. Distances are taken after a random projection, which changes them little (Johnson and Lindenstrauss, 1984).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.anomaly.patches import Floats

PROJECTED = 16  # dimensions in which vectors are chosen; they are kept with all of theirs
POOL = 100_000  # vectors to choose from, drawn at random if there are more: bounds the time


def coreset(vectors_NK: Floats, size: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices (size,) of the vectors to keep, sorted; all of them if there are no more."""
    if len(vectors_NK) <= size:
        return np.arange(len(vectors_NK))
    rng = np.random.default_rng(seed)
    if len(vectors_NK) > max(POOL, size):
        pool = np.sort(rng.choice(len(vectors_NK), max(POOL, size), replace=False))
        return pool[coreset(vectors_NK[pool], size, seed)]
    points = _projected(vectors_NK, rng)
    kept = np.empty(size, np.int64)
    kept[0] = rng.integers(len(points))
    lengths = np.square(points).sum(axis=1)
    farthest = np.full(len(points), np.inf, np.float32)  # squared distance to the nearest that was kept
    for number in range(1, size):
        last = kept[number - 1]
        np.minimum(farthest, lengths - 2 * (points @ points[last]) + lengths[last], out=farthest)
        farthest[last] = -1  # rounding must not choose it again
        kept[number] = farthest.argmax()
    return np.sort(kept)


def _projected(vectors_NK: Floats, rng: np.random.Generator) -> Floats:
    dimensions = vectors_NK.shape[1]
    if dimensions <= PROJECTED:
        return vectors_NK
    projection = rng.normal(size=(dimensions, PROJECTED)) / np.sqrt(PROJECTED)
    return np.ascontiguousarray(vectors_NK @ projection.astype(np.float32))
