"""Near-doubles: rows whose cosine with an earlier row is above a threshold. Exact: every pair counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import ConfigError
from mixmim_serve.extract.features import FeatureFolder, Vectors

THRESHOLD = 0.995  # docs/extract.md says what it finds with the shipped model
TILE = 4096  # rows on one side of a block of cosines: 64 MiB


@dataclass(frozen=True)
class Group:
    """An image and its doubles, in the order of the source; all are near the first, not always near each other."""

    keys: tuple[str, ...]
    cosines: tuple[float, ...]  # of each with the first


def duplicates(
    features: FeatureFolder, threshold: float = THRESHOLD, progress: Callable[[int], None] = lambda pairs: None
) -> list[Group]:
    """Groups of near-doubles, the largest first. Time grows with the square of the rows, memory with the rows.

    A row joins the first row before it that is near and has joined none itself. (Joining whatever is near to any
    member would chain: of 2,000 flowers 99 made one group at 0.97, with cosines down to 0.74.)

    Raises:
        ConfigError: for a threshold that is no cosine, or not positive.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"a threshold is a cosine above 0 and up to 1, got {threshold}.")
    nearest = threshold - 1e-6  # rounding may leave the cosine of equal rows just below 1
    firsts = np.arange(len(features))  # of each row: the one that it joins, or itself
    done = 0
    for left in range(len(features.shards)):
        for start, vectors in _tiles(features, left):
            _join_within(firsts, start, vectors, nearest)
            for right in range(left, len(features.shards)):
                for across, others in _tiles(features, right):
                    if across > start:
                        _join_across(firsts, start, vectors, across, others, nearest)
                        done += len(vectors) * len(others)
                progress(done)
    return _groups(features, firsts)


def _tiles(features: FeatureFolder, shard: int) -> Iterator[tuple[int, Vectors]]:
    block = features.block(shard)
    for start in range(0, len(block.vectors), TILE):
        yield block.start + start, block.vectors[start : start + TILE]


def _join_within(firsts: NDArray[np.int64], start: int, vectors: Vectors, nearest: float) -> None:
    """Rows of one tile, in order, since a row that joined another is joined by none."""
    near = np.triu(vectors @ vectors.T >= nearest, 1)
    here = firsts[start : start + len(vectors)]
    for row in np.flatnonzero(near.any(1)):
        if here[row] == start + row:
            joining = np.flatnonzero(near[row])
            joining = joining[here[joining] == start + joining]
            here[joining] = start + row


def _join_across(
    firsts: NDArray[np.int64], start: int, vectors: Vectors, across: int, others: Vectors, nearest: float
) -> None:
    """Rows of a later tile to those of an earlier one, whose own firsts are settled."""
    leaders = np.flatnonzero(firsts[start : start + len(vectors)] == start + np.arange(len(vectors)))
    if not len(leaders):
        return
    near = vectors[leaders] @ others.T >= nearest
    there = firsts[across : across + len(others)]
    joining = near.any(0) & (there == across + np.arange(len(others)))
    there[joining] = start + leaders[near.argmax(0)[joining]]


def _groups(features: FeatureFolder, firsts: NDArray[np.int64]) -> list[Group]:
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        members.setdefault(int(firsts[row]), [int(firsts[row])]).append(row)
    groups = []
    for rows in sorted(members.values(), key=lambda rows: (-len(rows), rows)):
        vectors = features.vectors(rows)
        groups.append(Group(tuple(features.keys(rows)), tuple((vectors @ vectors[0]).tolist())))
    return groups
