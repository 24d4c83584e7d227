"""Nearest rows by cosine: exact over all vectors, or from an index above a million rows.

The index is usearch's HNSW graph, built once and stored with the features. It finds nearly all true neighbours; their
cosines are then computed from the features themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixmim_serve.bundle import canonical_json
from mixmim_serve.errors import OutputError
from mixmim_serve.extract.features import FeatureFolder, Vectors

INDEX_ABOVE = 1_000_000  # rows; exact cosines of that many vectors of 1,024 numbers take seconds
INDEX = "index-{}.usearch"  # named by a hash of the shards, so that it is never used for other features


@dataclass(frozen=True)
class Neighbour:
    """One of the rows nearest to a query."""

    row: int
    key: str
    cosine: float


def neighbours(
    features: FeatureFolder,
    query: Vectors,
    count: int = 10,
    *,
    index_above: int = INDEX_ABOVE,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Neighbour]:
    """The `count` rows nearest to a query (D,), nearest first; equal cosines in row order.

    Raises:
        OutputError: the query is zero, not finite, or of another length than the features.
    """
    query = np.asarray(query, np.float32)
    width = features.block(0).vectors.shape[1]
    length = float(np.linalg.norm(query))
    if query.shape != (width,) or not np.isfinite(length) or length == 0:
        raise OutputError(f"a query must have {width} finite numbers that are not all zero; got shape {query.shape}.")
    query = query / length
    if len(features) > index_above and not features.folder.is_url:
        rows = _index(features, width, progress).search(query, count).keys.astype(np.int64)
        cosines = features.vectors(rows.tolist()) @ query
    else:
        rows, cosines = exact(features, query, count, progress)
    order = np.lexsort((rows, -cosines))
    keys = features.keys([int(rows[place]) for place in order])
    return [Neighbour(int(rows[place]), key, float(cosines[place])) for place, key in zip(order, keys, strict=True)]


def exact(features: FeatureFolder, query: Vectors, count: int, progress: Callable[[int], None]) -> tuple[Any, Vectors]:
    """Rows and cosines of the nearest, unordered; `query` must have length 1."""
    rows, cosines = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for block in features.blocks():
        similarity = block.vectors @ query
        best = np.argsort(-similarity, kind="stable")[:count]
        rows, cosines = np.append(rows, block.start + best), np.append(cosines, similarity[best])
        nearest = np.argsort(-cosines, kind="stable")[:count]
        rows, cosines = rows[nearest], cosines[nearest]
        progress(block.start + len(similarity))
    return rows, cosines


def _index(features: FeatureFolder, width: int, progress: Callable[[int], None]) -> Any:
    """The stored index, or a new one, which replaces those of other features."""
    from usearch.index import Index

    from mixmim_serve.files import atomic_path

    identity = hashlib.sha256(canonical_json(features.manifest["shards"])).hexdigest()[:16]
    path = Path(features.folder.path(INDEX.format(identity)))
    index = Index(ndim=width, metric="cos", dtype="f16")
    if path.exists():
        index.view(str(path))
        return index
    for block in features.blocks():
        index.add(np.arange(block.start, block.start + len(block.vectors), dtype=np.uint64), block.vectors)
        progress(block.start + len(block.vectors))
    for old in path.parent.glob(INDEX.format("*")):
        old.unlink()
    with atomic_path(path) as temporary:
        index.save(str(temporary))
    return index
