"""Decoding of untrusted images: a fair queue in front of threads for small images and processes for large ones.

Threads are fastest but cannot be stopped, so they only decode images whose cost is at most `SMALL`. Larger images go to
worker processes with limits on CPU time and memory: one that exceeds them, or whose client is gone, is killed and
replaced. Small images never wait behind large ones, and a request's next image waits behind the first images of other
requests. The cost of an image is its pixels times a factor for its format (`mixmim_serve.containers`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mixmim_serve.config import Preprocessing
from mixmim_serve.containers import Container, inspect
from mixmim_serve.preprocess import Pixels, decode, resize_and_crop
from mixmim_serve.service.batcher import PendingDecodes
from mixmim_serve.service.decode_process import DecodeProcess, DecodeSettings
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.fair_queue import FairQueue
from mixmim_serve.service.request import RequestContext
from mixmim_serve.service.settings import Settings

SMALL = 1e6  # cost in pixels up to which a thread decodes an image: about 10 ms that nothing can stop
START_SECONDS = 0.3  # of CPU time for a new process: what a client left is finished if that takes less
INSPECT_INLINE = 256 * 1024  # bytes up to which an image is inspected on the event loop


@dataclass
class _Turn:
    """A decode that waits for room in its lane."""

    granted: asyncio.Future[None]
    weight: float


class Lane:
    """Limits the weight of the decodes that run at once; the others wait in fair order."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used = capacity, 0.0
        self._queue: FairQueue[_Turn] = FairQueue()
        self._head: _Turn | None = None  # the next in order, if there is no room for it yet

    @contextlib.asynccontextmanager
    async def slot(self, context: RequestContext, weight: float, cost: float) -> AsyncIterator[None]:
        """Wait for room for `weight`, and hold it within the block."""
        turn = _Turn(asyncio.get_running_loop().create_future(), min(weight, self.capacity))
        self._queue.push(context.reservation.client, context.id, turn, cost)
        self._grant()
        try:
            await turn.granted
            yield
        finally:
            if turn.granted.done() and not turn.granted.cancelled():
                self.used -= turn.weight
            else:
                turn.granted.cancel()
            self._grant()

    def _grant(self) -> None:
        """Let the next decodes run, as many as there is room for."""
        while (turn := self._head or self._queue.pop()) is not None:
            self._head = turn
            if not turn.granted.done():
                if self.used + turn.weight > self.capacity:
                    return
                self.used += turn.weight
                turn.granted.set_result(None)
            self._head = None


class Decoder:
    """Decodes, resizes and crops the images of all requests."""

    def __init__(self, settings: Settings, preprocessing: Preprocessing, pending: PendingDecodes) -> None:
        self.settings, self.preprocessing, self.pending = settings, preprocessing, pending
        self.threads = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decode")
        self.small = Lane(settings.decoders)
        # By pixels: as many at once as there are decoders, fewer where they are so large that memory would not do.
        self.large = Lane(settings.max_pixels)
        self.process_threads = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decode-process")
        self.idle: list[DecodeProcess] = []
        self._process_settings = DecodeSettings(
            settings.max_image_bytes, settings.max_pixels, settings.decode_seconds, settings.decode_bytes, preprocessing
        )

    async def decode(self, image: bytes, context: RequestContext, preprocessing: Preprocessing | None = None) -> Pixels:
        """Decode one image as soon as it is the image's turn, for the network unless told otherwise.

        Raises:
            ImageError: when the image is refused, or exceeds the limits on CPU time or memory.
            RequestError: 413 when the images of the request cost too much, 429 when those of the client do.
        """
        if len(image) <= INSPECT_INLINE:
            container = self._inspect(image)
        else:
            container = await asyncio.get_running_loop().run_in_executor(self.threads, self._inspect, image)
        cost = container.decode_cost if container else 0.0
        wanted = preprocessing or self.preprocessing
        async with self._budget(context, cost):
            if cost <= SMALL:
                with self.pending.decoding(context.reservation.client):
                    async with self.small.slot(context, 1, cost):
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(self.threads, self._preprocess, image, container, wanted)
            await asyncio.sleep(0)  # all images of the request are counted before the first is decoded
            self._check_cost_of_request(context, context.decode_cost - cost)
            pixels = container.width * container.height if container else 0
            with self.pending.decoding(context.reservation.client):
                async with self.large.slot(context, max(pixels, self.large.capacity / self.settings.decoders), cost):
                    return await self._decode_in_process(image, wanted)

    @contextlib.asynccontextmanager
    async def _budget(self, context: RequestContext, cost: float) -> AsyncIterator[None]:
        """Count the cost of an image for its request and its client; an image that is the only one always passes."""
        others, context.decode_cost = context.decode_cost, context.decode_cost + cost
        self._check_cost_of_request(context, others)
        if _is_stream(context):
            await context.reservation.add_cost_when_free(cost)
        else:
            context.reservation.add_cost(cost)
        try:
            yield
        finally:
            context.reservation.remove_cost(cost)

    def _check_cost_of_request(self, context: RequestContext, others: float) -> None:
        if others and context.decode_cost > self.settings.max_request_megapixels * 1e6 and not _is_stream(context):
            message = (
                f"decoding the images of this request costs more than {self.settings.max_request_megapixels:,} "
                "megapixels: send fewer or smaller images."
            )
            raise RequestError(413, "too_much_to_decode", message)

    def _inspect(self, image: bytes) -> Container | None:
        """What the file's container says; None for a file above the limit, which `decode` refuses unread."""
        if len(image) > self.settings.max_image_bytes:
            return None
        return inspect(image, self.settings.max_pixels)

    def _preprocess(self, image: bytes, container: Container | None, preprocessing: Preprocessing) -> Pixels:
        limits = self.settings
        decoded = decode(image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels, container=container)
        return resize_and_crop(decoded, preprocessing)

    async def _decode_in_process(self, image: bytes, preprocessing: Preprocessing) -> Pixels:
        process = self.idle.pop() if self.idle else DecodeProcess(self._process_settings)
        pixels = asyncio.get_running_loop().run_in_executor(self.process_threads, process.decode, image, preprocessing)
        pixels.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to hear of it
        try:
            await asyncio.wait({pixels})
        except asyncio.CancelledError:  # nobody waits for this image any more
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({pixels}, timeout=START_SECONDS)
            raise
        finally:
            if not pixels.done():
                process.kill()
            elif process.is_alive:
                self.idle.append(process)
        return await pixels

    def close(self) -> None:
        """End the threads after the work in progress, and kill the processes."""
        self.threads.shutdown(cancel_futures=True)
        for process in self.idle:
            process.kill()
        self.process_threads.shutdown(cancel_futures=True)


def _is_stream(context: RequestContext) -> bool:
    return context.endpoint is not None and context.endpoint.streams
