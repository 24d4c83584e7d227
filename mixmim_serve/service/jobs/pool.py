"""Threads for the work of job requests, apart from those of the engine, of decoding and of asyncio."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class PoolFullError(Exception):
    """Too much work is waiting."""


class RequestPool:
    """A few threads and a bounded queue; close it.

    The threads are daemons: a file system that hangs cannot keep the process from ending.
    """

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._waiting, self._closed = waiting, False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, from one of the threads. Once cancelled, it does not begin any more.

        Raises:
            PoolFullError: too much is waiting, or the pool is closed.
        """
        if self._closed or self._queue.qsize() >= self._waiting:
            raise PoolFullError
        future: Future[Result] = Future()
        self._queue.put((future, work))
        return await asyncio.wrap_future(future)

    def close(self, seconds: float = 1.0) -> None:
        """End the threads after the work that they are doing, but do not wait longer than this for each."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _work(self) -> None:
        while task := self._queue.get():
            _run(*task)


def _run(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
