"""Requests in, batches to the engine, results back to each request.

No timer: whatever waits when the engine becomes free is the next batch, so one client sees no delay and many share
their batches (as in text-embeddings-inference). A batch that fails is split until the culprit alone fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import EngineError


@dataclass(frozen=True)
class Item:
    """One image, or pair, that waits for the engine."""

    inputs: Mapping[str, NDArray[Any]]  # without the batch dimension
    outputs: tuple[str, ...]
    result: asyncio.Future[Arrays]


class Batcher:
    """The queue of one graph; all batchers of an engine share its one thread."""

    def __init__(self, engine: Engine, graph: str, thread: ThreadPoolExecutor, max_batch: int = 32) -> None:
        self.engine, self.graph, self.thread = engine, graph, thread
        self.max_batch = largest_batch(engine, max_batch)
        self.waiting: list[Item] = []
        self.drainer: asyncio.Task[None] | None = None

    async def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """The chosen outputs for one item, without the batch dimension.

        Raises:
            EngineError: when the engine fails on this item.
        """
        item = Item(inputs, tuple(outputs), asyncio.get_running_loop().create_future())
        self.waiting.append(item)
        if self.drainer is None or self.drainer.done():
            self.drainer = asyncio.create_task(self._drain())
        return await item.result

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting[: self.max_batch], self.waiting[self.max_batch :]
            batch = [item for item in batch if not item.result.done()]  # whose client left meanwhile
            if batch:
                for item, result in zip(
                    batch, await loop.run_in_executor(self.thread, self._infer, batch), strict=True
                ):
                    _settle(item, result)

    def _infer(self, batch: list[Item]) -> list[Arrays | Exception]:
        """One result or exception an item, in order; runs in the engine's thread."""
        try:
            return list(self._run_batch(batch))
        except Exception as error:  # whatever it is, it must reach the requests that wait
            if len(batch) == 1:
                return [error]
            half = len(batch) // 2
            return self._infer(batch[:half]) + self._infer(batch[half:])

    def _run_batch(self, batch: list[Item]) -> list[Arrays]:
        inputs = {name: np.stack([item.inputs[name] for item in batch]) for name in batch[0].inputs}
        wanted = {name: None for item in batch for name in item.outputs}
        results = self.engine.run(self.graph, inputs, list(wanted))
        if any(len(array) != len(batch) for array in results.values()):
            raise EngineError(f"{self.engine.name} gave another number of results than the {len(batch)} inputs.")
        return [{name: results[name][row] for name in item.outputs} for row, item in enumerate(batch)]


def _settle(item: Item, result: Arrays | Exception) -> None:
    if item.result.done():
        return
    if isinstance(result, Exception):
        item.result.set_exception(result)
    else:
        item.result.set_result(result)
