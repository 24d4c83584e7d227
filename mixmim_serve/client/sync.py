"""The client for programs without an event loop."""

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
from mixmim_serve.client.many import Bulk, Embedded, OneModel, embedded, packs
from mixmim_serve.client.results import Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.client.retry import Outcome, Policy, Send, Steps, attempts, is_ready
from mixmim_serve.client.target import Target
from mixmim_serve.errors import ImageError, ServerError

Made = TypeVar("Made")


class Client:
    """A server, asked from any number of threads. Close it, or use it in `with`.

    Every call but `ready` may raise: RefusedError for a wrong key, option or route; UnavailableError when the policy's
    time or tries are used up; ServerError when the server fails. Those with images raise ImageError, with `param`, when
    the server refuses one. `http` is a client of httpx to use, for proxies or certificates; it is not closed.

    Raises:
        ConfigError: for a URL or a key that cannot be used.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, policy: Policy | None = None, http: httpx.Client | None = None
    ) -> None:
        self._target = Target(url, api_key, policy)
        self._http, self._is_ours = http or httpx.Client(), http is None
        self.jobs = Jobs(lambda steps: self._drive(steps, time.sleep), self._target.policy)

    def embed(self, image: Image, *, normalize: bool = False, dtype: Dtype = "float32") -> Embedding:
        """The embedding of an image; normalised to length 1 if asked for."""
        (found,) = self._call(calls.embed([encoded(image)], normalize, dtype))
        if isinstance(found, ImageError):
            raise found
        return found

    def classify(self, image: Image, *, top: int | None = None) -> Classes:
        """The most probable classes of an image, best first; 5 unless told otherwise."""
        return self._call(calls.classify(encoded(image), top))

    def features(
        self, image: Image, stages: Sequence[str] = ("stage4",), *, layout: Layout = "map", dtype: Dtype = "float32"
    ) -> Features:
        """Dense features of an image, of the stages named `stage1` to `stage4`."""
        return self._call(calls.features(encoded(image), stages, layout, dtype))

    def score(self, image: Image, *, masks: int | None = None, with_map: bool = False) -> Score:
        """How unlike the training data an image is: by so many pairs of masks, 2 unless told otherwise."""
        return self._call(calls.score(encoded(image), masks, with_map))

    def reconstruct(self, image_a: Image, image_b: Image, *, seed: int = 0, ratio: float = 0.5) -> Reconstruction:
        """Two images mixed and completed; `seed` and `ratio` choose the units that image B covers."""
        return self._call(calls.reconstruct([encoded(image_a), encoded(image_b)], seed, ratio))

    def model(self) -> ModelInfo:
        """What is served."""
        return self._call(calls.MODEL)

    def ready(self) -> bool:
        """Whether the server answers, and rightly; asked once.

        Raises:
            ServerError: when something answers that is no server of ours.
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
        """One result an image, in order, while `images` are read: at most `per_request * in_flight` are inside.

        An image that is refused, or on which the server fails, gives its error in its place, with `param` such as
        `input[3]`. A request is tried again, as a whole, for `patience` seconds, through a restart of the server too.

        Raises:
            ModelChangedError: when another model answers than at first, unless `same_model` is False.
            ConfigError, RefusedError, UnavailableError, ServerError: when nothing was wrong with the images.
        """
        options = Bulk(self._target.policy, patience, normalize, dtype, per_request, in_flight)
        model, waiting, ended = OneModel(same_model), deque[Future[list[Embedded]]](), threading.Event()
        threads = ThreadPoolExecutor(in_flight, thread_name_prefix="embed_many")
        try:
            for pack in packs(images, per_request):
                waiting.append(threads.submit(self._drive, embedded(pack, options), _until(ended)))
                if len(waiting) == in_flight:
                    yield from model.checked(waiting.popleft().result())
            while waiting:
                yield from model.checked(waiting.popleft().result())
        finally:
            ended.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        if self._is_ours:
            self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def _call(self, call: Call[Made]) -> Made:
        return self._drive(attempts(call, self._target.policy), time.sleep)

    def _drive(self, steps: Steps[Made], sleep: Callable[[float], object]) -> Made:
        """Do what the steps say until they have a result."""
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                result: Made = done.value
                return result
            outcome = None
            if isinstance(step, Send):
                outcome = self._send(step)
            else:
                sleep(step.seconds)

    def _send(self, send: Send) -> Outcome:
        deadline = time.monotonic() + send.seconds
        try:
            request = self._http.build_request(**self._target.request(send))
            with contextlib.closing(self._http.send(request, stream=True)) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        return httpx.ReadTimeout("the answer was not complete in time")
                return Reply(response.status_code, response.headers, bytes(content))
        except httpx.RequestError as error:
            return error


def _until(ended: threading.Event) -> Callable[[float], None]:
    """Sleep for threads whose work nobody may want any more."""

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):
            raise ServerError("given up: nobody waits for the results.")

    return sleep
