"""Images decoded in threads ahead of the engine, and run in batches on a thread of their own.

Decoding runs in threads, not processes: Pillow, hashing and file reads let go of Python's lock, so nothing has to be
copied between processes.
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

Item = TypeVar("Item")
Answer = TypeVar("Answer")

BATCH = 32  # images a call of the engine
AHEAD = 4  # batches that are decoded before the engine asks for them; bounds memory
QUEUED = 2  # batches that the engine has: the one it runs, and the next

# A JPEG is decoded at a half, a quarter or an eighth only where its shorter side stays so many times as long as the
# side to which it is resized (docs/extract.md says what was measured).
FAST_JPEG_MARGIN = 2.5


@dataclass(frozen=True)
class Decoded:
    """An image as engines take it, with the size that it had, upright."""

    pixels: Pixels
    width: int
    height: int


@dataclass(frozen=True)
class Ready(Generic[Item]):
    """An item with its pixels, or why there are none."""

    item: Item
    pixels: Pixels | None
    error: ImageError | None = None


def decode_small(data: bytes, preprocessing: Preprocessing, fast_jpeg: bool = False) -> Decoded:
    """Encoded image -> network input; `fast_jpeg` lets large JPEGs be decoded at a fraction of their size.

    Raises:
        ImageError: the image is refused; see `mixmim_serve.preprocess.decode`.
    """
    original: list[int] = []

    def reduction(width: int, height: int) -> int:
        original.extend((width, height))
        least = FAST_JPEG_MARGIN * preprocessing.resize_size
        return jpeg_reduction(min(width, height), least)

    image = decode(data, reduction=reduction if fast_jpeg else None)
    width, height = original or image.size
    return Decoded(resize_and_crop(image, preprocessing), width, height)


def map_ahead(
    pool: Executor, function: Callable[[Item], Answer], items: Iterable[Item], ahead: int
) -> Generator[Answer, None, None]:
    """What `map` gives, in order, with `ahead` items begun at once and kept under way; the rest is not touched yet."""
    rest = iter(items)
    waiting: deque[Future[Answer]] = deque(pool.submit(function, item) for item in itertools.islice(rest, ahead))

    def answers() -> Generator[Answer, None, None]:
        try:
            while waiting:
                answer = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
                yield answer
        finally:
            for future in waiting:
                future.cancel()

    return answers()


class Runner:
    """An engine on a thread of its own, so that it works while others decode and write; `busy` counts its seconds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.busy = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._counting = threading.Lock()

    def batches(
        self, ready: Iterable[Ready[Item]], outputs: Sequence[str], batch: int, *, full: bool
    ) -> Generator[tuple[list[Ready[Item]], Arrays], None, None]:
        """Items in groups of `batch`, in order, each with the outputs of those that have pixels, a row each.

        `full`: black images fill up each batch, so that all have one shape and no image's numbers depend on how many
        others there are.
        """
        items = iter(ready)
        running: deque[tuple[list[Ready[Item]], Future[Arrays]]] = deque()
        try:
            while group := list(itertools.islice(items, batch)):
                pixels = [each.pixels for each in group if each.pixels is not None]
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
        """End the thread; what runs is finished."""
        self._thread.shutdown()

    def _run(self, stacked: Pixels | None, rows: int, outputs: Sequence[str]) -> Arrays:
        if stacked is None:
            return {}
        began = time.perf_counter()
        arrays = self.engine.run("encoder", {"pixels": stacked}, outputs)
        with self._counting:
            self.busy += time.perf_counter() - began
        return {name: array[:rows] for name, array in arrays.items()}


@dataclass(frozen=True)
class Result:
    """The outputs for one file, or why there are none."""

    path: Path
    outputs: Arrays  # without the batch dimension; empty when there is an error
    error: ImageError | None = None


def run_files(engine: Engine, paths: Sequence[Path], outputs: Sequence[str], batch: int = BATCH) -> Iterator[Result]:
    """The encoder's chosen outputs for each file, in order; an unreadable image is a result with an error.

    The last batch is as small as it is, so one file alone gives what `/embed` gives for it, to the last bit.
    """
    preprocessing, batch = engine.bundle.description.preprocessing, largest_batch(engine, batch)

    def load(path: Path) -> Ready[Path]:
        try:
            return Ready(path, preprocess(read_limited(path), preprocessing))
        except ImageError as error:
            return Ready(path, None, error)

    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(contextlib.closing(Runner(engine)))
        pool = stack.enter_context(ThreadPoolExecutor(usable_cores()))
        ready = stack.enter_context(contextlib.closing(map_ahead(pool, load, paths, AHEAD * batch)))
        for group, arrays in runner.batches(ready, outputs, batch, full=False):
            rows = iter(range(len(group)))
            for each in group:
                row = None if each.error else next(rows)
                found = {} if row is None else {name: array[row] for name, array in arrays.items()}
                yield Result(each.item, found, each.error)


def _stacked(pixels: Sequence[Pixels], rows: int) -> Pixels | None:
    """One array of so many images, black ones behind; None without any."""
    if not pixels:
        return None
    stacked = np.zeros((rows, *pixels[0].shape), np.uint8)
    np.stack(pixels, out=stacked[: len(pixels)])
    return stacked
