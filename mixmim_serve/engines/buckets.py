"""Batches of a few fixed sizes, for runtimes that pay for each new one.

ONNX Runtime's arena grows with each new shape (onnxruntime issues 14474, 22297), a CUDA graph is captured for one shape
only. A batch is padded up to its bucket by repeating its last row, and the results are cut back; one that is larger
than the largest bucket is run in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

BUCKETS = (1, 2, 4, 8, 16, 32)


def buckets_between(smallest: int, largest: int) -> tuple[int, ...]:
    """Powers of two, and both ends: what an engine that takes these batches is run with."""
    powers = (2**power for power in range(largest.bit_length()))
    return tuple(sorted({smallest, largest, *(power for power in powers if smallest < power < largest)}))


def bucket_of(count: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest that holds `count` rows; `count` is at most the largest."""
    return next(bucket for bucket in buckets if bucket >= count)


def pieces(count: int, buckets: Sequence[int] = BUCKETS) -> Iterator[slice]:
    """Consecutive rows, as many as the largest bucket holds."""
    for start in range(0, count, buckets[-1]):
        yield slice(start, min(start + buckets[-1], count))


def padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Contiguous, with the last row repeated up to `size` rows; no copy where none is needed."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


def run_in_buckets(
    run: Callable[[Arrays], Arrays], inputs: Arrays, buckets: Sequence[int] = BUCKETS
) -> dict[str, NDArray[Any]]:
    """What `run` gives for `inputs`, asked in batches of these sizes only; every array has one row an item."""
    count = len(next(iter(inputs.values())))
    found = []
    for rows in pieces(count, buckets):
        size = bucket_of(rows.stop - rows.start, buckets)
        results = run({name: padded(array[rows], size) for name, array in inputs.items()})
        found.append({name: array[: rows.stop - rows.start] for name, array in results.items()})
    if len(found) == 1:
        return dict(found[0])
    return {name: np.concatenate([results[name] for results in found]) for name in found[0]}
