"""Near-duplicates: rows whose cosine with an earlier row reaches a threshold. Exact: every pair is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import ConfigError
from mixmim_serve.extract.features import FeatureFolder, Vectors

THRESHOLD = 0.995  # unless threshold.py chooses one from the data
TILE = 4096  # rows on each side of a tile of cosines: 64 MiB


@dataclass(frozen=True)
class Group:
    """An image and its near-duplicates, in the order of the source; all are near the first, not always each other."""

    keys: tuple[str, ...]
    cosines: tuple[float, ...]  # of each image with the first


def duplicates(
    features: FeatureFolder, threshold: float = THRESHOLD, progress: Callable[[int], None] = lambda pairs: None
) -> list[Group]:
    """Groups of near-duplicates, the largest first. Time is quadratic in the number of rows, memory linear.

    A row joins the first earlier row that is near and has not joined a row itself. (Joining any near member would
    chain: of 2,000 flowers 99 formed one group at 0.97, with cosines down to 0.74.)

    Raises:
        ConfigError: for a threshold outside (0, 1].
    """
    check_threshold(threshold)
    nearest = threshold - 1e-6  # rounding may leave the cosine of equal rows just below 1
    firsts = np.arange(len(features))  # the row that each row joins, or itself
    compared = 0
    for shard in range(len(features.shards)):
        for start, vectors in _tiles(features, shard):
            _join_within(firsts, start, vectors, nearest)
            for later_shard in range(shard, len(features.shards)):
                for later_start, later in _tiles(features, later_shard):
                    if later_start > start:
                        _join_across(firsts, start, vectors, later_start, later, nearest)
                        compared += len(vectors) * len(later)
                progress(compared)
    return _groups(features, firsts)


def check_threshold(threshold: float) -> None:
    """Check that it is a cosine.

    Raises:
        ConfigError: for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be a cosine above 0 and at most 1, got {threshold}.")


def _tiles(features: FeatureFolder, shard: int) -> Iterator[tuple[int, Vectors]]:
    block = features.block(shard)
    for start in range(0, len(block.vectors), TILE):
        yield block.start + start, block.vectors[start : start + TILE]


def _join_within(firsts: NDArray[np.int64], start: int, vectors: Vectors, nearest: float) -> None:
    """Join rows within a tile, in order, since no row may join one that has joined another."""
    near = np.triu(vectors @ vectors.T >= nearest, 1)
    own_firsts = firsts[start : start + len(vectors)]  # a view
    for row in np.flatnonzero(near.any(1)):
        if own_firsts[row] == start + row:
            joining = np.flatnonzero(near[row])
            joining = joining[own_firsts[joining] == start + joining]
            own_firsts[joining] = start + row


def _join_across(
    firsts: NDArray[np.int64], start: int, vectors: Vectors, later_start: int, later: Vectors, nearest: float
) -> None:
    """Join rows of a later tile to those of an earlier one, whose own firsts are final."""
    leaders = np.flatnonzero(firsts[start : start + len(vectors)] == start + np.arange(len(vectors)))
    if not len(leaders):
        return
    near = vectors[leaders] @ later.T >= nearest
    later_firsts = firsts[later_start : later_start + len(later)]  # a view
    joining = near.any(0) & (later_firsts == later_start + np.arange(len(later)))
    later_firsts[joining] = start + leaders[near.argmax(0)[joining]]


def _groups(features: FeatureFolder, firsts: NDArray[np.int64]) -> list[Group]:
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        members.setdefault(int(firsts[row]), [int(firsts[row])]).append(row)
    groups = []
    for rows in sorted(members.values(), key=lambda rows: (-len(rows), rows)):
        vectors = features.vectors(rows)
        groups.append(Group(tuple(features.keys(rows)), tuple((vectors @ vectors[0]).tolist())))
    return groups
