"""What is remembered of normal photos, and how far others are from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.anomaly.coreset import coreset
from mixmim_serve.anomaly.nearest import References, distances
from mixmim_serve.anomaly.patches import Floats, Whitening, whitening

NEIGHBOURS = 3  # of an embedding whose mean distance counts
AROUND = 9  # references around the nearest one, itself included, that tell how dense normal patches are there
SHARE = 0.25  # of a photo's patches, those farthest from normal ones, whose mean counts; at least one patch
PART_NAMES = ("patches", "embedding")


@dataclass(frozen=True)
class Distances:
    """How far photos are from normal ones."""

    places: Floats  # (B, H, W), of each place
    parts: Floats  # (B, 2), of the patches and of the embedding of each photo


@dataclass(frozen=True)
class Memory:
    """References that new photos are compared with."""

    patches: References  # (M, K), a coreset
    around: NDArray[np.int32]  # (M, `AROUND` or fewer), the references nearest to each, itself included
    whiten: Whitening  # of embeddings
    embeddings: References  # (N, K), whitened

    @classmethod
    def of(cls, patches_NHWK: Floats, embeddings_ND: Floats, size: int, seed: int = 0) -> Memory:
        """Remember photos by at most `size` of their patches, and by their embeddings."""
        vectors = patches_NHWK.reshape(-1, patches_NHWK.shape[-1])
        kept = References(vectors[coreset(vectors, size, seed)])
        whiten = whitening(embeddings_ND, min(embeddings_ND.shape))
        around = kept.indices(kept.vectors, AROUND).astype(np.int32)
        return cls(kept, around, whiten, References(whiten(embeddings_ND)))

    def distances(self, patches_BHWK: Floats, embeddings_BD: Floats) -> Distances:
        """How far photos are from the references."""
        count, rows, columns, size = patches_BHWK.shape
        places = self.weighted(patches_BHWK.reshape(-1, size)).reshape(count, rows * columns)
        of_embeddings = self.embeddings.mean_distance(self.whiten(embeddings_BD), NEIGHBOURS)
        parts = np.column_stack([_mean_of_farthest(places), of_embeddings])
        return Distances(places.reshape(count, rows, columns), parts)

    def weighted(self, patches_NK: Floats) -> Floats:
        """Distance (N,) of each patch to the nearest reference, less where normal patches are rare.

        The weight is PatchCore's (arXiv 2106.08265, equation 7): 1 minus the softmax of the distance to the nearest
        reference among those to the references around it.
        """
        distance, nearest = self.patches.nearest(patches_NK)
        to_around = distances(patches_NK[:, None], self.patches.vectors[self.around[nearest]])
        weight = 1 - 1 / np.exp(np.minimum(to_around - distance[:, None], 50)).sum(axis=1)
        return np.asarray(distance * weight, np.float32)


def _mean_of_farthest(places_BP: Floats) -> Floats:
    """Mean distance (B,) of the `SHARE` of each photo's places that are farthest from normal ones."""
    count = max(1, round(SHARE * places_BP.shape[1]))
    return np.asarray(np.partition(places_BP, -count, axis=1)[:, -count:].mean(axis=1), np.float32)
