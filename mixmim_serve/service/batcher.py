"""Dynamic batching: requests in, batches to the engine, results back to each request.

Whatever waits when the engine becomes free is the next batch, so one client sees no delay and many share batches. A
full batch is stacked while the engine is still busy (both as in text-embeddings-inference). A batch that fails is
split in halves until only the item at fault fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import EngineError


@dataclass(frozen=True)
class BatchResult:
    """One item's outputs, and how long they took."""

    outputs: Arrays  # without the batch dimension
    queue: float  # seconds until its batch began
    infer: float  # seconds of its batch


class PendingDecodes:
    """Images being decoded, for which an engine that shares the cores with the decoders should wait.

    Running at once would slow their decoding down, and a batch of eight takes half as long per image as eight batches
    of one. The engine waits at most as long as the last batch took, in which about as many images are decoded again,
    within these bounds in seconds; 0 where the engine has a device of its own.
    """

    def __init__(self, min_wait: float = 0.0, max_wait: float = 0.0) -> None:
        self.min_wait, self.max_wait = min_wait, max_wait
        self.last_batch = 0.0  # seconds
        self.count = 0
        self._changed = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        self._changed.set()

    @property
    def wait_limit(self) -> float:
        """Seconds that the next batch waits at most."""
        return min(max(self.min_wait, self.last_batch), self.max_wait)

    async def wait_while(self, wanted: Callable[[], bool]) -> None:
        """Wait until nothing is being decoded, the limit has passed, or no more images are wanted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.wait_limit):
                while self.count and wanted():
                    self._changed.clear()
                    await self._changed.wait()
                    await asyncio.sleep(0)  # lets a decoded image join the queue


@dataclass(frozen=True, eq=False)
class QueuedItem:
    """One image, or pair of images, that waits for the engine."""

    inputs: Mapping[str, NDArray[Any]]  # without the batch dimension
    outputs: tuple[str, ...]
    result: asyncio.Future[BatchResult]
    queued_at: float = field(default_factory=time.perf_counter)

    @property
    def is_wanted(self) -> bool:
        """False once its client disconnected or its deadline passed."""
        return not self.result.done()


class Batcher:
    """The queue of one graph, used from one event loop. All batchers of an engine share its one thread.

    `observe` is called with the size and seconds of each batch.
    """

    def __init__(
        self,
        engine: Engine,
        graph: str,
        thread: ThreadPoolExecutor,
        max_batch: int = 32,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
        pending_decodes: PendingDecodes | None = None,
        stack_thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.engine, self.graph, self.observe = engine, graph, observe
        self.thread, self.stack_thread = thread, stack_thread or thread
        self.max_batch = largest_batch(engine, max_batch)
        self.pending_decodes = pending_decodes or PendingDecodes()
        self.waiting: deque[QueuedItem] = deque()
        self.drainer: asyncio.Task[None] | None = None
        self.next_batch: list[QueuedItem] = []  # a full batch, taken out of `waiting`
        self.next_arrays: asyncio.Future[Arrays | None] | None = None  # its arrays, being stacked

    @property
    def queued(self) -> int:
        """Items that wait for the engine."""
        return len(self.waiting) + len(self.next_batch)

    async def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, urgent: bool = False
    ) -> BatchResult:
        """The chosen outputs for one item; an urgent item goes to the head of the queue.

        Raises:
            EngineError: when the engine fails on this item.
        """
        item = QueuedItem(inputs, tuple(outputs), asyncio.get_running_loop().create_future())
        if urgent:
            self.waiting.appendleft(item)
        else:
            self.waiting.append(item)
        if self.drainer is None or self.drainer.done():
            self.drainer = asyncio.create_task(self._drain())
        else:
            self._stack_ahead()
        return await item.result

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self.queued:
            items, arrays = await self._next()
            if items:
                job = loop.run_in_executor(self.thread, self._infer_timed, items, arrays)
                self._stack_ahead()
                began, seconds, results = await job
                self.observe(len(items), seconds)
                self.pending_decodes.last_batch = seconds
                for item, result in zip(items, results, strict=True):
                    _settle(item, result, began, seconds)

    async def _next(self) -> tuple[list[QueuedItem], Arrays | None]:
        """The next batch of items that are still wanted, with their arrays if those are stacked already."""
        if self.next_arrays is None:
            if self.pending_decodes.wait_limit:
                await self.pending_decodes.wait_while(lambda: len(self.waiting) < self.max_batch)
            return self._take(), None
        arrays = await self.next_arrays
        items, self.next_batch, self.next_arrays = self.next_batch, [], None
        wanted = [item for item in items if item.is_wanted]
        return wanted, arrays if len(wanted) == len(items) else None

    def _take(self) -> list[QueuedItem]:
        wanted = (item for item in _pop_all(self.waiting) if item.is_wanted)
        return list(itertools.islice(wanted, self.max_batch))

    def _stack_ahead(self) -> None:
        """When a full batch waits for a busy engine, stack it off the event loop and beside the engine."""
        if self.next_arrays is None and len(self.waiting) >= self.max_batch:
            self.next_batch = self._take()
            loop = asyncio.get_running_loop()
            self.next_arrays = loop.run_in_executor(self.stack_thread, _try_stack, self.next_batch)

    def _infer_timed(
        self, items: list[QueuedItem], arrays: Arrays | None
    ) -> tuple[float, float, list[Arrays | Exception]]:
        began = time.perf_counter()
        results = self._infer(items, arrays)
        return began, time.perf_counter() - began, results

    def _infer(self, items: list[QueuedItem], arrays: Arrays | None = None) -> list[Arrays | Exception]:
        """One result or exception per item, in order; runs in the engine's thread."""
        try:
            return list(self._run_batch(items, _stack(items) if arrays is None else arrays))
        except Exception as error:  # whatever it is, it must reach the requests that wait
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._infer(items[:half]) + self._infer(items[half:])

    def _run_batch(self, items: list[QueuedItem], arrays: Arrays) -> list[Arrays]:
        names = {name: None for item in items for name in item.outputs}
        results = self.engine.run(self.graph, arrays, list(names))
        for array in results.values():
            if len(array) != len(items):
                raise EngineError(f"{self.engine.name} returned {len(array)} results for {len(items)} inputs.")
        return [{name: results[name][row] for name in item.outputs} for row, item in enumerate(items)]


def _pop_all(waiting: deque[QueuedItem]) -> Iterator[QueuedItem]:
    while waiting:
        yield waiting.popleft()


def _stack(items: Sequence[QueuedItem]) -> Arrays:
    return {name: np.stack([item.inputs[name] for item in items]) for name in items[0].inputs}


def _try_stack(items: Sequence[QueuedItem]) -> Arrays | None:
    """None for items that do not stack: the engine's thread then finds the one at fault."""
    try:
        return _stack(items) if items else None
    except Exception:
        return None


def _settle(item: QueuedItem, result: Arrays | Exception, began: float, seconds: float) -> None:
    if item.result.done():
        return
    if isinstance(result, Exception):
        item.result.set_exception(result)
    else:
        item.result.set_result(BatchResult(result, began - item.queued_at, seconds))
