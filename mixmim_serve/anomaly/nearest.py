"""Nearest neighbours by Euclidean distance, as one matrix product per block; for thousands of references, exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.anomaly.patches import Floats

BLOCK = 2**21  # distances in memory at once: 8 MiB


class References:
    """Vectors (M, K) that others are compared with."""

    def __init__(self, vectors_MK: Floats) -> None:
        self.vectors = vectors_MK
        lengths = np.square(vectors_MK, dtype=np.float64).sum(axis=1)
        # -|q - r|^2 / 2 = q . r - |r|^2 / 2 - |q|^2 / 2: the first two terms are one product of longer vectors.
        self._longer = np.ascontiguousarray(np.column_stack([vectors_MK, -lengths / 2]).T, np.float32)

    def __len__(self) -> int:
        return len(self.vectors)

    def nearest(self, queries_NK: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Distance (N,) of each query to the nearest reference, and which that is."""
        indices = np.empty(len(queries_NK), np.int64)
        for block, products in self._products(queries_NK):
            indices[block] = products.argmax(axis=1)
        return distances(queries_NK, self.vectors[indices]), indices

    def indices(self, queries_NK: Floats, count: int) -> NDArray[np.int64]:
        """The `count` nearest references of each query, or all if there are fewer, in any order."""
        count = min(count, len(self))
        found = np.empty((len(queries_NK), count), np.int64)
        for block, products in self._products(queries_NK):
            found[block] = np.argpartition(products, -count, axis=1)[:, -count:]
        return found

    def mean_distance(self, queries_NK: Floats, count: int) -> Floats:
        """Mean distance (N,) of each query to the `count` nearest references."""
        near = self.vectors[self.indices(queries_NK, count)]
        return np.asarray(distances(queries_NK[:, None], near).mean(axis=1), np.float32)

    def _products(self, queries_NK: Floats) -> Iterator[tuple[slice, Floats]]:
        """For each block of queries: larger for a nearer reference, (rows, M)."""
        longer = np.column_stack([queries_NK, np.ones(len(queries_NK), np.float32)])
        rows = max(1, BLOCK // len(self))
        for start in range(0, len(longer), rows):
            block = slice(start, start + rows)
            yield block, longer[block] @ self._longer


def distances(queries: Floats, references: Floats) -> Floats:
    """Euclidean distances over the last dimension, from differences: exact for near ones, 0 for equal ones."""
    return np.asarray(np.sqrt(np.square(queries - references).sum(axis=-1)), np.float32)
