"""Patch features: one vector for each place of an image, from one of the encoder's stages.

Shapes: B images, D channels, H x W places, N vectors, K kept dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# The last stage, as it is: other stages, stages side by side and means of 3 x 3 places, as PatchCore takes, found fewer
# defects (docs/decisions.md, 2026-11-25).
STAGE = "stage4"
SHRINK = 0.1  # share of the mean variance in a covariance, so that directions without variance count less


def patch_features(outputs: Mapping[str, NDArray[Any]], stage: str = STAGE) -> Floats:
    """The feature map (B, D, H, W) of a stage as vectors (B, H, W, D)."""
    return np.ascontiguousarray(outputs[stage].transpose(0, 2, 3, 1), np.float32)


@dataclass(frozen=True)
class Whitening:
    """Vectors to principal components of unit variance: Euclidean distances become Mahalanobis distances."""

    mean: Floats  # (D,)
    matrix: Floats  # (D, K)

    def __call__(self, vectors: Floats) -> Floats:
        """(..., D) to (..., K)."""
        return np.asarray((vectors - self.mean) @ self.matrix, np.float32)


def whitening(vectors_ND: Floats, dimensions: int, shrink: float = SHRINK) -> Whitening:
    """Whiten by the mean and covariance of vectors, in their `dimensions` components of the largest variance.

    The covariance is shrunk towards its mean variance, as few photos say little of many directions (Ledoit and Wolf,
    "A well-conditioned estimator for large-dimensional covariance matrices", 2004, with a fixed share).
    """
    exact = vectors_ND.astype(np.float64)
    mean = exact.mean(axis=0)
    covariance = (exact - mean).T @ (exact - mean) / max(len(exact) - 1, 1)
    average = max(float(np.trace(covariance)) / len(covariance), 1e-12)
    covariance = (1 - shrink) * covariance + shrink * average * np.eye(len(covariance))
    variances, directions = np.linalg.eigh(covariance)  # in ascending order
    kept = slice(-dimensions, None)
    return Whitening(mean.astype(np.float32), (directions[:, kept] / np.sqrt(variances[kept])).astype(np.float32))
