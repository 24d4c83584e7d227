"""Image files through an engine: decoded ahead in threads, run in batches, answered in order."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixmim_serve.config import Preprocessing
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import Pixels, preprocess, read_limited

BATCH = 32
AHEAD = 3  # batches that are decoded before the engine asks for them; bounds memory


@dataclass(frozen=True)
class Result:
    """The outputs for one file, or why there are none."""

    path: Path
    outputs: Arrays  # without the batch dimension; empty when there is an error
    error: ImageError | None = None


def run_files(engine: Engine, paths: Sequence[Path], outputs: Sequence[str], batch: int = BATCH) -> Iterator[Result]:
    """The encoder's chosen outputs for each file, in order; an unreadable image is a result with an error."""
    batch = largest_batch(engine, batch)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in _batched(_decoded(pool, paths, engine.bundle.description.preprocessing, AHEAD * batch), batch):
            yield from _run_group(engine, group, outputs)


def _decoded(
    pool: ThreadPoolExecutor, paths: Iterable[Path], preprocessing: Preprocessing, ahead: int
) -> Iterator[tuple[Path, Pixels | ImageError]]:
    """Preprocessed images in order, at most `ahead` of them waiting."""
    waiting: deque[tuple[Path, Future[Pixels | ImageError]]] = deque()
    for path in paths:
        waiting.append((path, pool.submit(_load, path, preprocessing)))
        if len(waiting) >= ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _load(path: Path, preprocessing: Preprocessing) -> Pixels | ImageError:
    try:
        return preprocess(read_limited(path), preprocessing)
    except ImageError as error:
        return error


def _run_group(
    engine: Engine, group: Sequence[tuple[Path, Pixels | ImageError]], outputs: Sequence[str]
) -> Iterator[Result]:
    readable = [pixels for _, pixels in group if not isinstance(pixels, ImageError)]
    arrays = engine.run("encoder", {"pixels": np.stack(readable)}, outputs) if readable else {}
    row = 0
    for path, pixels in group:
        if isinstance(pixels, ImageError):
            yield Result(path, {}, pixels)
        else:
            yield Result(path, {name: array[row] for name, array in arrays.items()})
            row += 1


def _batched(
    items: Iterator[tuple[Path, Pixels | ImageError]], size: int
) -> Iterator[list[tuple[Path, Pixels | ImageError]]]:
    while group := list(itertools.islice(items, size)):
        yield group
