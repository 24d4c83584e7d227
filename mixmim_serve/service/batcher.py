"""Requests in, batches to the engine, results back to each request.

Whatever waits when the engine becomes free is the next batch, so one client sees no delay and many share
their batches; a batch that is full already is put together while the engine is busy (both as in
text-embeddings-inference). A batch that fails is split until the culprit alone fails.
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
class Ran:
    """What the engine gave for one item, and how long that took."""

    outputs: Arrays  # without the batch dimension
    queue: float  # seconds until its batch began
    infer: float  # seconds of its batch


class Coming:
    """Images that are being decoded, which an engine that shares the cores with the decoders had better wait for.

    It would only slow their decoding down, and a batch of eight takes half as long an image as eight batches of one.
    It waits at most as long as the last batch took, in which about as many are decoded again, within these bounds (s).
    """

    def __init__(self, least: float = 0.0, most: float = 0.0) -> None:
        self.least, self.most = least, most  # 0 where the engine has a device of its own
        self.last = 0.0  # seconds of the last batch
        self.count = 0
        self._changed = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        self._changed.set()

    @property
    def patience(self) -> float:
        """Seconds that a batch waits at most."""
        return min(max(self.least, self.last), self.most)

    async def wait_while(self, wanted: Callable[[], bool]) -> None:
        """Until nothing is coming, patience ends, or no more is wanted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience):
                while self.count and wanted():
                    self._changed.clear()
                    await self._changed.wait()
                    await asyncio.sleep(0)  # what was decoded joins those that wait


@dataclass(frozen=True, eq=False)
class Item:
    """One image, or pair, that waits for the engine."""

    inputs: Mapping[str, NDArray[Any]]  # without the batch dimension
    outputs: tuple[str, ...]
    result: asyncio.Future[Ran]
    since: float = field(default_factory=time.perf_counter)

    @property
    def wanted(self) -> bool:
        """False once its client left or its deadline passed."""
        return not self.result.done()


class Batcher:
    """The queue of one graph; all batchers of an engine share its one thread. One event loop uses it.

    `observe` is told the size and seconds of each batch.
    """

    def __init__(
        self,
        engine: Engine,
        graph: str,
        thread: ThreadPoolExecutor,
        max_batch: int = 32,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
        coming: Coming | None = None,
    ) -> None:
        self.engine, self.graph, self.thread, self.observe = engine, graph, thread, observe
        self.max_batch = largest_batch(engine, max_batch)
        self.coming = coming or Coming()
        self.waiting: deque[Item] = deque()
        self.drainer: asyncio.Task[None] | None = None
        self.next: list[Item] = []  # a full batch, taken from those that wait
        self.stacked: asyncio.Future[Arrays | None] | None = None  # and put together

    @property
    def queued(self) -> int:
        """Items that wait for the engine."""
        return len(self.waiting) + len(self.next)

    async def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, urgent: bool = False) -> Ran:
        """The chosen outputs for one item; an urgent one goes before those that wait.

        Raises:
            EngineError: when the engine fails on this item.
        """
        item = Item(inputs, tuple(outputs), asyncio.get_running_loop().create_future())
        if urgent:
            self.waiting.appendleft(item)
        else:
            self.waiting.append(item)
        if self.drainer is None or self.drainer.done():
            self.drainer = asyncio.create_task(self._drain())
        else:
            self._prepare()
        return await item.result

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self.queued:
            items, arrays = await self._take_next()
            if items:
                job = loop.run_in_executor(self.thread, self._timed, items, arrays)
                self._prepare()
                began, seconds, results = await job
                self.observe(len(items), seconds)
                self.coming.last = seconds
                for item, result in zip(items, results, strict=True):
                    _settle(item, result, began, seconds)

    async def _take_next(self) -> tuple[list[Item], Arrays | None]:
        """Items that are still wanted, stacked if that is done already."""
        if self.stacked is None:
            if self.coming.patience:
                await self.coming.wait_while(lambda: len(self.waiting) < self.max_batch)
            return self._take(), None
        arrays = await self.stacked
        items, self.next, self.stacked = self.next, [], None
        wanted = [item for item in items if item.wanted]
        return wanted, arrays if len(wanted) == len(items) else None

    def _take(self) -> list[Item]:
        wanted = (item for item in _emptied(self.waiting) if item.wanted)
        return list(itertools.islice(wanted, self.max_batch))

    def _prepare(self) -> None:
        """When a full batch waits for a busy engine, stack it beside the event loop and the engine."""
        if self.stacked is None and len(self.waiting) >= self.max_batch:
            self.next = self._take()
            self.stacked = asyncio.get_running_loop().run_in_executor(None, _stack_or_leave, self.next)

    def _timed(self, items: list[Item], arrays: Arrays | None) -> tuple[float, float, list[Arrays | Exception]]:
        began = time.perf_counter()
        results = self._infer(items, arrays)
        return began, time.perf_counter() - began, results

    def _infer(self, items: list[Item], arrays: Arrays | None = None) -> list[Arrays | Exception]:
        """One result or exception an item, in order; runs in the engine's thread."""
        try:
            return list(self._run_batch(items, _stack(items) if arrays is None else arrays))
        except Exception as error:  # whatever it is, it must reach the requests that wait
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._infer(items[:half]) + self._infer(items[half:])

    def _run_batch(self, items: list[Item], arrays: Arrays) -> list[Arrays]:
        wanted = {name: None for item in items for name in item.outputs}
        results = self.engine.run(self.graph, arrays, list(wanted))
        if any(len(array) != len(items) for array in results.values()):
            raise EngineError(f"{self.engine.name} gave another number of results than the {len(items)} inputs.")
        return [{name: results[name][row] for name in item.outputs} for row, item in enumerate(items)]


def _emptied(waiting: deque[Item]) -> Iterator[Item]:
    while waiting:
        yield waiting.popleft()


def _stack(items: Sequence[Item]) -> Arrays:
    return {name: np.stack([item.inputs[name] for item in items]) for name in items[0].inputs}


def _stack_or_leave(items: Sequence[Item]) -> Arrays | None:
    """Items that do not fit together are left to the engine's thread, which finds the culprit."""
    try:
        return _stack(items) if items else None
    except Exception:
        return None


def _settle(item: Item, result: Arrays | Exception, began: float, seconds: float) -> None:
    if item.result.done():
        return
    if isinstance(result, Exception):
        item.result.set_exception(result)
    else:
        item.result.set_result(Ran(result, began - item.since, seconds))
