"""Decode images in threads ahead of the engine, which runs in batches on a thread of its own.

Decoding runs in threads, not processes: Pillow, hashing and file reads release the GIL, and nothing has to be copied
between processes.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mixmim_serve.config import Preprocessing
from mixmim_serve.cores import usable_cores
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import Pixels, decode, jpeg_reduction, preprocess, read_limited, resize_and_crop

In = TypeVar("In")
Out = TypeVar("Out")

BATCH = 32  # images per call of the engine
AHEAD = 4  # batches decoded ahead of the engine; bounds memory
QUEUED = 2  # batches submitted to the engine: the running one and the next

# A JPEG is decoded at a half, a quarter or an eighth only if its shorter side stays at least this many times as long as
# the side that it is resized to (measured in docs/extract.md).
FAST_JPEG_MARGIN = 2.5


@dataclass(frozen=True)
class Decoded:
    """Engine input, with the original size of the upright image."""

    pixels: Pixels
    width: int
    height: int


@dataclass(frozen=True)
class Loaded(Generic[In]):
    """What was loaded from an item: its pixels, or why there are none."""

    item: In
    pixels: Pixels | None
    error: ImageError | None = None


def decode_small(data: bytes, preprocessing: Preprocessing, fast_jpeg: bool = False) -> Decoded:
    """Encoded image -> engine input; with `fast_jpeg` large JPEGs are decoded at a fraction of their size.

    Raises:
        ImageError: the image is rejected; see `mixmim_serve.preprocess.decode`.
    """
    full_size: list[int] = []

    def reduction(width: int, height: int) -> int:
        full_size.extend((width, height))
        least = FAST_JPEG_MARGIN * preprocessing.resize_size
        return jpeg_reduction(min(width, height), least)

    image = decode(data, reduction=reduction if fast_jpeg else None)
    width, height = full_size or image.size
    return Decoded(resize_and_crop(image, preprocessing), width, height)


def map_ahead(
    pool: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Generator[Out, None, None]:
    """Like `map` over a pool, in order, but lazy: `ahead` items are submitted at once, then one per result."""
    rest = iter(items)
    waiting: deque[Future[Out]] = deque(pool.submit(function, item) for item in itertools.islice(rest, ahead))

    def results() -> Generator[Out, None, None]:
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()

    return results()


class Runner:
    """Runs an engine on a thread of its own, while others decode and write; `busy` sums the seconds it computes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.busy = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._counting = threading.Lock()

    def batches(
        self, loaded: Iterable[Loaded[In]], outputs: Sequence[str], batch: int, *, full: bool
    ) -> Generator[tuple[list[Loaded[In]], Arrays], None, None]:
        """Items in groups of `batch`, in order, each with the outputs of the items that have pixels, one row per item.

        `full` pads each batch with black images, so that all have one shape and the outputs of an image do not depend
        on the number of others.
        """
        items = iter(loaded)
        running: deque[tuple[list[Loaded[In]], Future[Arrays]]] = deque()
        try:
            while group := list(itertools.islice(items, batch)):
                pixels = [entry.pixels for entry in group if entry.pixels is not None]
                stacked = _stacked(pixels, batch if full else len(pixels))
                running.append((group, self._thread.submit(self._run, stacked, len(pixels), outputs)))
                if len(running) >= QUEUED:
                    done, future = running.popleft()
                    yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        finally:
            for _, future in running:
                future.cancel()

    def close(self) -> None:
        """End the thread, after the running batches."""
        self._thread.shutdown()

    def _run(self, stacked: Pixels | None, rows: int, outputs: Sequence[str]) -> Arrays:
        if stacked is None:
            return {}
        started = time.perf_counter()
        arrays = self.engine.run("encoder", {"pixels": stacked}, outputs)
        with self._counting:
            self.busy += time.perf_counter() - started
        return {name: array[:rows] for name, array in arrays.items()}


@dataclass(frozen=True)
class FileResult:
    """The outputs for one file, or why there are none."""

    path: Path
    outputs: Arrays  # without the batch dimension; empty after an error
    error: ImageError | None = None


def run_files(
    engine: Engine, paths: Sequence[Path], outputs: Sequence[str], batch: int = BATCH
) -> Iterator[FileResult]:
    """The chosen encoder outputs for each file, in order; an unreadable image gives a result with an error.

    The last batch is not padded, so a single file gives the same bits as `/embed`.
    """
    preprocessing, batch = engine.bundle.description.preprocessing, largest_batch(engine, batch)

    def load(path: Path) -> Loaded[Path]:
        try:
            return Loaded(path, preprocess(read_limited(path), preprocessing))
        except ImageError as error:
            return Loaded(path, None, error)

    with contextlib.closing(run_ahead(engine, load, paths, outputs, batch)) as groups:
        for group, arrays in groups:
            rows = iter(range(len(group)))
            for entry in group:
                row = None if entry.error else next(rows)
                own = {} if row is None else {name: array[row] for name, array in arrays.items()}
                yield FileResult(entry.item, own, entry.error)


def run_ahead(
    engine: Engine, load: Callable[[In], Loaded[In]], items: Iterable[In], outputs: Sequence[str], batch: int
) -> Generator[tuple[list[Loaded[In]], Arrays], None, None]:
    """Items in groups of `batch`, in order, each with its outputs (`Runner.batches`); `load` runs in threads, ahead."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(contextlib.closing(Runner(engine)))
        pool = stack.enter_context(ThreadPoolExecutor(usable_cores()))
        loaded = stack.enter_context(contextlib.closing(map_ahead(pool, load, items, AHEAD * batch)))
        yield from runner.batches(loaded, outputs, batch, full=False)


def _stacked(pixels: Sequence[Pixels], rows: int) -> Pixels | None:
    """The images in one array of `rows`, padded with black ones; None without images."""
    if not pixels:
        return None
    stacked = np.zeros((rows, *pixels[0].shape), np.uint8)
    np.stack(pixels, out=stacked[: len(pixels)])
    return stacked
