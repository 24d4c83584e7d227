"""The synchronous client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import httpx

from mixmim_serve.client import calls
from mixmim_serve.client.answers import Reply
from mixmim_serve.client.calls import Call, Dtype, Layout
from mixmim_serve.client.images import Image, encoded
from mixmim_serve.client.jobs import Jobs
from mixmim_serve.client.many import Bulk, Embedded, OneModel, embed_pack, packs
from mixmim_serve.client.results import Anomaly, Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.client.retry import Outcome, Policy, Send, Steps, attempts, is_ready
from mixmim_serve.client.target import Target
from mixmim_serve.errors import ImageError, ServerError

Value = TypeVar("Value")


class Client:
    """A client of one server, safe to use from any number of threads. Close it, or use it in `with`.

    Every call but `ready` may raise RefusedError for a wrong API key, option or route, UnavailableError when time or
    retries run out, and ServerError when the server fails. Calls with images raise ImageError, with `param`, when the
    server rejects one. `http` is the httpx client to use, for proxies or certificates; `close` leaves it open.

    Raises:
        ConfigError: for an invalid URL or API key.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, policy: Policy | None = None, http: httpx.Client | None = None
    ) -> None:
        self._target = Target(url, api_key, policy)
        self._http, self._is_ours = http or httpx.Client(), http is None
        self.jobs = Jobs(lambda steps: self._drive(steps, time.sleep), self._target.policy)

    def embed(self, image: Image, *, normalize: bool = False, dtype: Dtype = "float32") -> Embedding:
        """Embed an image; `normalize` scales the vector to length 1."""
        (result,) = self._call(calls.embed([encoded(image)], normalize, dtype))
        if isinstance(result, ImageError):
            raise result
        return result

    def classify(self, image: Image, *, top: int | None = None, head: str | None = None) -> Classes:
        """The `top` (5) most probable classes of an image, best first, by the model's default head or a named one."""
        return self._call(calls.classify(encoded(image), top, head))

    def features(
        self, image: Image, stages: Sequence[str] = ("stage4",), *, layout: Layout = "map", dtype: Dtype = "float32"
    ) -> Features:
        """Dense features of an image from any of `stage1` to `stage4`, before pooling."""
        return self._call(calls.features(encoded(image), stages, layout, dtype))

    def score(self, image: Image, *, masks: int | None = None, with_map: bool = False) -> Score:
        """The reconstruction error of an image over `masks` pairs of masks (2); no detector of defects."""
        return self._call(calls.score(encoded(image), masks, with_map))

    def anomaly(self, image: Image, *, with_map: bool = False, overlay: bool = False) -> Anomaly:
        """How far an image is from the normal ones of a calibrated bundle: score, percentile, normal or not."""
        return self._call(calls.anomaly(encoded(image), with_map, overlay))

    def reconstruct(self, image_a: Image, image_b: Image, *, seed: int = 0, ratio: float = 0.5) -> Reconstruction:
        """Mix two images and complete both; `seed` and `ratio` choose the units that image B covers."""
        return self._call(calls.reconstruct([encoded(image_a), encoded(image_b)], seed, ratio))

    def model(self) -> ModelInfo:
        """The served model."""
        return self._call(calls.MODEL)

    def ready(self) -> bool:
        """Whether the server is ready; checked once, without retries.

        Raises:
            ServerError: when the response is not from mixmim-serve.
        """
        return self._drive(is_ready(self._target.policy), time.sleep)

    def embed_many(
        self,
        images: Iterable[Image],
        *,
        normalize: bool = False,
        dtype: Dtype = "float32",
        per_request: int = 16,
        in_flight: int = 4,
        patience: float = 600.0,
        same_model: bool = True,
    ) -> Iterator[Embedded]:
        """One result per image, in order. `images` are read lazily, at most `per_request * in_flight` ahead.

        An image that is rejected, or on which the server fails, yields its error instead, with `param` such as
        `input[3]`. Requests are retried as a whole for `patience` seconds, even through a restart of the server.

        Raises:
            ModelChangedError: when the model changes between requests, unless `same_model` is False.
            ConfigError, RefusedError, UnavailableError, ServerError: for failures that the images did not cause.
        """
        options = Bulk(self._target.policy, patience, normalize, dtype, per_request, in_flight)
        model, waiting, cancelled = OneModel(same_model), deque[Future[list[Embedded]]](), threading.Event()
        threads = ThreadPoolExecutor(in_flight, thread_name_prefix="embed_many")
        try:
            for pack in packs(images, per_request):
                waiting.append(threads.submit(self._drive, embed_pack(pack, options), _sleep_until(cancelled)))
                if len(waiting) == in_flight:
                    yield from model.checked(waiting.popleft().result())
            while waiting:
                yield from model.checked(waiting.popleft().result())
        finally:
            cancelled.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        if self._is_ours:
            self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, call: Call[Value]) -> Value:
        return self._drive(attempts(call, self._target.policy), time.sleep)

    def _drive(self, steps: Steps[Value], sleep: Callable[[float], object]) -> Value:
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
                outcome = self._target.outcome(self._send(step))
            else:
                sleep(step.seconds)

    def _send(self, send: Send) -> Reply | httpx.RequestError:
        deadline = time.monotonic() + send.seconds
        try:
            request = self._http.build_request(**self._target.request(send))
            with contextlib.closing(self._http.send(request, stream=True)) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        return httpx.ReadTimeout("the response was not complete in time")
                return Reply(response.status_code, response.headers, bytes(content))
        except httpx.RequestError as error:
            return error


def _sleep_until(cancelled: threading.Event) -> Callable[[float], None]:
    """A `sleep` for threads that raises once the results are no longer wanted."""

    def sleep(seconds: float) -> None:
        if cancelled.wait(seconds):
            raise ServerError("cancelled: the results are no longer wanted.")

    return sleep
