"""The asynchronous client, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import TypeVar

import httpx

from mixmim_serve.client import calls
from mixmim_serve.client.answers import Reply
from mixmim_serve.client.calls import Call, Dtype, Layout
from mixmim_serve.client.images import Image, encoded
from mixmim_serve.client.jobs import AsyncJobs
from mixmim_serve.client.many import Bulk, Embedded, OneModel, Pack, Packer, embed_pack, load
from mixmim_serve.client.results import Anomaly, Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.client.retry import Outcome, Policy, Send, Steps, attempts, is_ready
from mixmim_serve.client.target import Target
from mixmim_serve.errors import ImageError

Value = TypeVar("Value")


class AsyncClient:
    """A client of one server, for any number of tasks; see `Client`. Close it, or use it in `async with`.

    Raises:
        ConfigError: for an invalid URL or API key.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        policy: Policy | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._target = Target(url, api_key, policy)
        self._http, self._is_ours = http or httpx.AsyncClient(), http is None
        self.jobs = AsyncJobs(self._drive, self._target.policy)

    async def embed(self, image: Image, *, normalize: bool = False, dtype: Dtype = "float32") -> Embedding:
        """Embed an image; `normalize` scales the vector to length 1."""
        (result,) = await self._call(calls.embed([await _encoded(image)], normalize, dtype))
        if isinstance(result, ImageError):
            raise result
        return result

    async def classify(self, image: Image, *, top: int | None = None, head: str | None = None) -> Classes:
        """The `top` (5) most probable classes of an image, best first, by the model's default head or a named one."""
        return await self._call(calls.classify(await _encoded(image), top, head))

    async def features(
        self, image: Image, stages: Sequence[str] = ("stage4",), *, layout: Layout = "map", dtype: Dtype = "float32"
    ) -> Features:
        """Dense features of an image from any of `stage1` to `stage4`, before pooling."""
        return await self._call(calls.features(await _encoded(image), stages, layout, dtype))

    async def score(self, image: Image, *, masks: int | None = None, with_map: bool = False) -> Score:
        """The reconstruction error of an image over `masks` pairs of masks (2); no detector of defects."""
        return await self._call(calls.score(await _encoded(image), masks, with_map))

    async def anomaly(self, image: Image, *, with_map: bool = False, overlay: bool = False) -> Anomaly:
        """How far an image is from the normal ones of a calibrated bundle: score, percentile, normal or not."""
        return await self._call(calls.anomaly(await _encoded(image), with_map, overlay))

    async def reconstruct(self, image_a: Image, image_b: Image, *, seed: int = 0, ratio: float = 0.5) -> Reconstruction:
        """Mix two images and complete both; `seed` and `ratio` choose the units that image B covers."""
        images = [await _encoded(image_a), await _encoded(image_b)]
        return await self._call(calls.reconstruct(images, seed, ratio))

    async def model(self) -> ModelInfo:
        """The served model."""
        return await self._call(calls.MODEL)

    async def ready(self) -> bool:
        """Whether the server is ready; checked once, without retries.

        Raises:
            ServerError: when the response is not from mixmim-serve.
        """
        return await self._drive(is_ready(self._target.policy))

    async def embed_many(
        self,
        images: Iterable[Image] | AsyncIterable[Image],
        *,
        normalize: bool = False,
        dtype: Dtype = "float32",
        per_request: int = 16,
        in_flight: int = 4,
        patience: float = 600.0,
        same_model: bool = True,
    ) -> AsyncIterator[Embedded]:
        """One result per image, in order; see `Client.embed_many`.

        Raises:
            ModelChangedError: when the model changes between requests, unless `same_model` is False.
            ConfigError, RefusedError, UnavailableError, ServerError: for failures that the images did not cause.
        """
        options = Bulk(self._target.policy, patience, normalize, dtype, per_request, in_flight)
        model, waiting = OneModel(same_model), deque[asyncio.Task[list[Embedded]]]()
        try:
            async for pack in _packs(images, per_request):
                waiting.append(asyncio.create_task(self._drive(embed_pack(pack, options))))
                if len(waiting) == in_flight:
                    for result in model.checked(await waiting[0]):
                        yield result
                    waiting.popleft()
            while waiting:
                for result in model.checked(await waiting[0]):
                    yield result
                waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def close(self) -> None:
        """Close the connections."""
        if self._is_ours:
            await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(self, call: Call[Value]) -> Value:
        return await self._drive(attempts(call, self._target.policy))

    async def _drive(self, steps: Steps[Value]) -> Value:
        """Carry out the steps until they return a result."""
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: Value = end.value
                return result
            outcome = None
            if isinstance(step, Send):
                outcome = self._target.outcome(await self._send(step))
            else:
                await asyncio.sleep(step.seconds)

    async def _send(self, send: Send) -> Reply | httpx.RequestError:
        try:
            async with asyncio.timeout(send.seconds):
                request = self._http.build_request(**self._target.request(send))
                async with contextlib.aclosing(await self._http.send(request, stream=True)) as response:
                    return Reply(response.status_code, response.headers, await response.aread())
        except TimeoutError:
            return httpx.ReadTimeout("the response was not complete in time")
        except httpx.RequestError as error:
            return error


async def _encoded(image: Image) -> bytes:
    """Encode in a thread, as files are read and pixels compressed."""
    return image if isinstance(image, bytes) else await asyncio.to_thread(encoded, image)


async def _packs(images: Iterable[Image] | AsyncIterable[Image], per_request: int) -> AsyncIterator[Pack]:
    """Like `packs`, with images loaded in a thread."""
    packer = Packer(per_request)
    async for image in images if isinstance(images, AsyncIterable) else _one_by_one(images):
        for pack in packer.add(image if isinstance(image, bytes) else await asyncio.to_thread(load, image)):
            yield pack
    for pack in packer.rest():
        yield pack


async def _one_by_one(images: Iterable[Image]) -> AsyncIterator[Image]:
    for image in images:
        yield image
