"""Nearest rows by cosine: exact, over every vector; from an index where there are more than a million.

The index is usearch's HNSW graph, built once and kept beside the features. It finds nearly all true neighbours; their
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

INDEX_ABOVE = 1_000_000  # rows; that many exact cosines of 1,024 numbers take seconds
INDEX = "index-{}.usearch"  # with what it was built from, so that it never answers for other features


@dataclass(frozen=True)
class Neighbour:
    """One row that is near a query."""

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
    """The `count` nearest rows of a query, (D,), the nearest first; of equal ones the earlier.

    Raises:
        OutputError: the query has another length than the features, or is no direction at all.
    """
    query = np.asarray(query, np.float32)
    width = features.block(0).vectors.shape[1]
    length = float(np.linalg.norm(query))
    if query.shape != (width,) or not np.isfinite(length) or length == 0:
        raise OutputError(f"a query has {width} finite numbers that are not all zero; got {query.shape}.")
    query = query / length
    if len(features) > index_above and not features.folder.is_url:
        rows = _index(features, width, progress).search(query, count).keys.astype(np.int64)
        cosines = features.vectors(rows.tolist()) @ query
    else:
        rows, cosines = exact(features, query, count, progress)
    order = np.lexsort((rows, -cosines))
    names = features.keys([int(rows[place]) for place in order])
    return [Neighbour(int(rows[place]), name, float(cosines[place])) for place, name in zip(order, names, strict=True)]


def exact(features: FeatureFolder, query: Vectors, count: int, progress: Callable[[int], None]) -> tuple[Any, Vectors]:
    """Rows and cosines of the nearest, in no order; `query` has the length 1."""
    rows, cosines = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for block in features.blocks():
        here = block.vectors @ query
        best = np.argsort(-here, kind="stable")[:count]
        rows, cosines = np.append(rows, block.start + best), np.append(cosines, here[best])
        kept = np.argsort(-cosines, kind="stable")[:count]
        rows, cosines = rows[kept], cosines[kept]
        progress(block.start + len(here))
    return rows, cosines


def _index(features: FeatureFolder, width: int, progress: Callable[[int], None]) -> Any:
    """Opened, or built."""
    from usearch.index import Index

    from mixmim_serve.files import atomic_path

    about = hashlib.sha256(canonical_json(features.manifest["shards"])).hexdigest()[:16]
    path = Path(features.folder.path(INDEX.format(about)))
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
