"""Rows laid out in a plane, so that what is alike lies together: scikit-learn's t-SNE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import DataError, OutputError
from mixmim_serve.extract.features import FeatureFolder

IMAGES = 3000  # on a map, evenly from all: more would hide each other
FEWEST = 4
PERPLEXITY = 30.0  # about how many neighbours a row is kept beside; t-SNE's usual value


@dataclass(frozen=True)
class MapLayout:
    """Keys and where they lie, (rows, 2), both coordinates from 0 to 1."""

    keys: tuple[str, ...]
    places: NDArray[np.float64]


def layout(features: FeatureFolder, images: int = IMAGES) -> MapLayout:
    """The places of at most `images` rows, taken evenly. The same features give the same places.

    Raises:
        OutputError: there are too few rows.
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise DataError("scikit-learn is not installed: run pip install 'mixmim-serve[explore]'.") from error

    count = min(images, len(features))
    if count < FEWEST:
        raise OutputError(f"a map needs {FEWEST} images at least; {features.folder.place} has {len(features)}.")
    rows = np.unique(np.linspace(0, len(features) - 1, count).round().astype(np.int64)).tolist()
    vectors = features.vectors(rows)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=-1).fit_transform(vectors)
    low, high = places.min(0), places.max(0)
    return MapLayout(tuple(features.keys(rows)), (places - low) / np.maximum(high - low, 1e-12))
