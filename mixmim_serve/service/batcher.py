"""Dynamic batching: requests in, batches to the engine, results back to each request.

Whatever waits when the engine becomes free is the next batch, so one client sees no delay and many share batches. A
full batch is stacked while the engine is still busy (both as in text-embeddings-inference). A batch that fails is
split in halves until only the item at fault fails.

The queue is fair between clients, and while several clients send images, a batch takes only a few from each: the images
of one client wait neither behind all those of another nor for a batch full of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays, largest_batch
from mixmim_serve.errors import EngineError, NotFiniteError
from mixmim_serve.service.fair_queue import FairQueue

BATCH_SECONDS = 0.2  # of the engine for a batch of more than `SMALL_BATCH` images: what comes meanwhile waits so long
SMALL_BATCH = 8
SHARED_SECONDS = 0.012  # of the engine for the images of one client in a batch that several share; at least one image
# Part of a batch's seconds that the next one waits for the clients to send another image. Otherwise 32 clients fall
# into two halves whose batches take turns, each beside the decoding of the other: an eighth fewer images per second.
RETURN_SHARE = 0.05
SHARED_WAIT = 0.005  # seconds for which a batch of several clients waits for images being decoded
FEW = 4  # images of one client being decoded for which another client's batch waits
SHARING_SECONDS = 10.0  # after images of two clients, for which the engine is taken to be shared


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
    within these bounds in seconds; 0 where the engine has a device of its own. It does not wait for a client with more
    than `FEW` images while another client's image is ready.
    """

    def __init__(self, min_wait: float = 0.0, max_wait: float = 0.0) -> None:
        self.min_wait, self.max_wait = min_wait, max_wait
        self.last_batch = 0.0  # seconds
        self.return_wait = 0.0  # seconds until the clients of the last batch are back
        self.by_client: Counter[str] = Counter()
        self._changed = asyncio.Event()

    @contextlib.contextmanager
    def decoding(self, client: str) -> Iterator[None]:
        """Count an image of a client within the block."""
        self.by_client[client] += 1
        try:
            yield
        finally:
            self.by_client[client] -= 1
            if not self.by_client[client]:
                del self.by_client[client]
            self._changed.set()

    def note_batch(self, seconds: float, size: int) -> None:
        """Note how long a batch took."""
        self.last_batch = seconds
        self.return_wait = RETURN_SHARE * seconds if size >= FEW else 0.0

    def is_worth_waiting(self, ready: Collection[str]) -> bool:
        """Whether images are decoded that the images of the clients `ready` should wait for."""
        return any(count <= FEW or all(client == other for other in ready) for client, count in self.by_client.items())

    @property
    def wait_limit(self) -> float:
        """Seconds that the next batch waits at most."""
        return min(max(self.min_wait, self.last_batch), self.max_wait)

    async def wait_while(
        self, wanted: Callable[[], bool], ready: Callable[[], Collection[str]], shared: bool = False
    ) -> None:
        """Wait until nothing worth it is being decoded, the limit has passed, or no more images are wanted."""
        limit = min(self.wait_limit, SHARED_WAIT) if shared else self.wait_limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                if self.return_wait and wanted():
                    await asyncio.sleep(self.return_wait)
                while self.is_worth_waiting(ready()) and wanted():
                    self._changed.clear()
                    await self._changed.wait()
                    await asyncio.sleep(0)  # lets a decoded image join the queue


class RecentClients:
    """Whether several clients use an engine; its batchers share it."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._several_until = 0.0

    def add(self, client: str) -> None:
        """Note that an image of a client came."""
        if self._last is not None and client != self._last:
            self._several_until = time.monotonic() + SHARING_SECONDS
        self._last = client

    @property
    def are_several(self) -> bool:
        """Whether images of two clients came one after the other a short time ago."""
        return time.monotonic() < self._several_until


@dataclass(frozen=True, eq=False)
class QueuedItem:
    """One image, or pair of images, that waits for the engine."""

    inputs: Mapping[str, NDArray[Any]]  # without the batch dimension
    outputs: tuple[str, ...]
    result: asyncio.Future[BatchResult]
    client: str = ""
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
        recent_clients: RecentClients | None = None,
    ) -> None:
        self.engine, self.graph, self.observe = engine, graph, observe
        self.thread, self.stack_thread = thread, stack_thread or thread
        self.max_batch = largest_batch(engine, max_batch)
        self.pending_decodes = pending_decodes or PendingDecodes()
        self.urgent: deque[QueuedItem] = deque()  # come before all that waits
        self.waiting: FairQueue[QueuedItem] = FairQueue()
        self.recent_clients = recent_clients or RecentClients()
        self.seconds_per_item = 0.0  # of the last batches; 0 before the first
        self.drainer: asyncio.Task[None] | None = None
        self.next_batch: list[QueuedItem] = []  # a full batch, taken out of `waiting`
        self.next_arrays: asyncio.Future[Arrays | None] | None = None  # its arrays, being stacked

    @property
    def queued(self) -> int:
        """Items that wait for the engine."""
        return len(self.urgent) + len(self.waiting) + len(self.next_batch)

    async def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        *,
        client: str = "",
        request: str = "",
        urgent: bool = False,
    ) -> BatchResult:
        """The chosen outputs for one item of a client's request; an urgent item comes before all others.

        Raises:
            EngineError: when the engine fails on this item.
            NotFiniteError: when one of its outputs has inf or NaN.
        """
        item = QueuedItem(inputs, tuple(outputs), asyncio.get_running_loop().create_future(), client)
        if urgent:
            self.urgent.append(item)
        else:
            self.waiting.push(client, request, item)
            self.recent_clients.add(client)
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
                self.pending_decodes.note_batch(seconds, len(items))
                self._learn(seconds, len(items))
                for item, result in zip(items, results, strict=True):
                    _settle(item, result, began, seconds)

    async def _next(self) -> tuple[list[QueuedItem], Arrays | None]:
        """The next batch of items that are still wanted, with their arrays if those are stacked already."""
        if self.next_arrays is None:
            if self.pending_decodes.wait_limit and not self.urgent:
                await self.pending_decodes.wait_while(
                    lambda: not self._is_full(), lambda: self.waiting.clients, self._is_shared()
                )
            return self._take(), None
        arrays = await self.next_arrays
        items, self.next_batch, self.next_arrays = self.next_batch, [], None
        wanted = [item for item in items if item.is_wanted]
        return wanted, arrays if len(wanted) == len(items) else None

    def _learn(self, seconds: float, items: int) -> None:
        """Note how long a batch took; one image alone takes longer than its share of a batch, and does not count."""
        if items > 1:
            last, known = seconds / items, self.seconds_per_item
            self.seconds_per_item = 0.8 * known + 0.2 * last if known else last

    def _is_shared(self) -> bool:
        return self.recent_clients.are_several or len(self.waiting.clients) > 1

    def _most_per_client(self) -> int:
        """Images of one client that the next batch may take."""
        if not self.seconds_per_item:
            return 1 if self._is_shared() else self.max_batch
        if self._is_shared():
            return max(1, int(SHARED_SECONDS / self.seconds_per_item))
        return min(self.max_batch, max(SMALL_BATCH, int(BATCH_SECONDS / self.seconds_per_item)))

    def _is_full(self) -> bool:
        """Whether there is enough for the next batch."""
        return len(self.waiting) >= min(self.max_batch, self._most_per_client() * len(self.waiting.clients))

    def _take(self) -> list[QueuedItem]:
        items = [item for item in _pop_all(self.urgent) if item.is_wanted]
        taken: Counter[str] = Counter()
        most = self._most_per_client()
        while len(items) < self.max_batch and (client := self.waiting.next_client()) is not None:
            if taken[client] >= most:
                break
            item = self.waiting.pop()
            if item is not None and item.is_wanted:
                items.append(item)
                taken[client] += 1
        return items

    def _stack_ahead(self) -> None:
        """When a full batch of one client waits for a busy engine, stack it off the event loop, beside the engine."""
        is_full = bool(self.waiting) and self._is_full() and not self._is_shared()
        if self.next_arrays is None and is_full and not self.urgent:
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
            return self._run_batch(items, _stack(items) if arrays is None else arrays)
        except Exception as error:  # whatever it is, it must reach the requests that wait
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._infer(items[:half]) + self._infer(items[half:])

    def _run_batch(self, items: list[QueuedItem], arrays: Arrays) -> list[Arrays | Exception]:
        names = {name: None for item in items for name in item.outputs}
        results = self.engine.run(self.graph, arrays, list(names))
        for array in results.values():
            if len(array) != len(items):
                raise EngineError(f"{self.engine.name} returned {len(array)} results for {len(items)} inputs.")
        return [_finite({name: results[name][row] for name in item.outputs}) for row, item in enumerate(items)]


def _finite(outputs: Arrays) -> Arrays | NotFiniteError:
    """The outputs of one item, or the error if they have inf or NaN."""
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            return NotFiniteError(f"the model's {name} for this image has inf or NaN: send another image.")
    return outputs


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
