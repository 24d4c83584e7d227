"""Batches of a few fixed sizes, for runtimes where each new size costs something.

ONNX Runtime's arena grows with each new shape (onnxruntime issues 14474, 22297), and a CUDA graph is captured for one
shape only. A batch is padded to its bucket by repeating its last row, and the outputs are cut back. A batch larger than
the largest bucket runs in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

BUCKETS = (1, 2, 4, 8, 16, 32)


def buckets_between(smallest: int, largest: int) -> tuple[int, ...]:
    """Bucket sizes of an engine that takes `smallest` to `largest` rows: both ends, and the powers of two between."""
    powers = (2**power for power in range(largest.bit_length()))
    return tuple(sorted({smallest, largest, *(power for power in powers if smallest < power < largest)}))


def bucket_of(count: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `count` rows; `count` must fit the largest."""
    return next(bucket for bucket in buckets if bucket >= count)


def pieces(count: int, buckets: Sequence[int] = BUCKETS) -> Iterator[slice]:
    """Slices of `count` rows, each as long as the largest bucket at most."""
    for start in range(0, count, buckets[-1]):
        yield slice(start, min(start + buckets[-1], count))


def padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """A contiguous array of `size` rows, the last one repeated; copied only if needed."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


def run_in_buckets(
    run: Callable[[Arrays], Arrays], inputs: Arrays, buckets: Sequence[int] = BUCKETS
) -> dict[str, NDArray[Any]]:
    """The outputs of `run`, which is called only with batches of these sizes."""
    count = len(next(iter(inputs.values())))
    outputs = []
    for rows in pieces(count, buckets):
        size = bucket_of(rows.stop - rows.start, buckets)
        results = run({name: padded(array[rows], size) for name, array in inputs.items()})
        outputs.append({name: array[: rows.stop - rows.start] for name, array in results.items()})
    if len(outputs) == 1:
        return dict(outputs[0])
    return {name: np.concatenate([results[name] for results in outputs]) for name in outputs[0]}
