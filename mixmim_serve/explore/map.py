"""Lay out rows in a plane so that similar images lie close together: scikit-learn's t-SNE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import DataError, OutputError
from mixmim_serve.extract.features import FeatureFolder

IMAGES = 3000  # on a map, evenly spaced rows: more would cover each other
MIN_IMAGES = 4
PERPLEXITY = 30.0  # about the number of neighbours that a row stays close to; t-SNE's usual value


@dataclass(frozen=True)
class MapLayout:
    """Keys and their positions on the map."""

    keys: tuple[str, ...]
    places: NDArray[np.float64]  # (rows, 2), both coordinates from 0 to 1


def sampled_rows(features: FeatureFolder, images: int = IMAGES) -> list[int]:
    """The rows that a map of at most `images` images shows.

    Raises:
        OutputError: there are too few rows.
    """
    count = min(images, len(features))
    if count < MIN_IMAGES:
        raise OutputError(f"a map needs at least {MIN_IMAGES} images, {features.folder.place} has {len(features)}.")
    rows: list[int] = np.unique(np.linspace(0, len(features) - 1, count).round().astype(np.int64)).tolist()
    return rows


def layout(features: FeatureFolder, images: int = IMAGES) -> MapLayout:
    """Lay out at most `images` evenly spaced rows. The same features give the same layout.

    Raises:
        OutputError: there are too few rows.
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise DataError("scikit-learn is not installed: run pip install 'mixmim-serve[explore]'.") from error

    rows = sampled_rows(features, images)
    vectors = features.vectors(rows)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=-1).fit_transform(vectors)
    low, high = places.min(0), places.max(0)
    return MapLayout(tuple(features.keys(rows)), (places - low) / np.maximum(high - low, 1e-12))
