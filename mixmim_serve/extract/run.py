"""Image files through an engine: decoded ahead in threads, run in batches, answered in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import ImageError
from mixmim_serve.extract.pipeline import AHEAD, BATCH, Ready, Runner, map_ahead
from mixmim_serve.preprocess import preprocess, read_limited


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
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        ready = stack.enter_context(contextlib.closing(map_ahead(pool, load, paths, AHEAD * batch)))
        for group, arrays in runner.batches(ready, outputs, batch, full=False):
            rows = iter(range(len(group)))
            for each in group:
                row = None if each.error else next(rows)
                found = {} if row is None else {name: array[row] for name, array in arrays.items()}
                yield Result(each.item, found, each.error)
