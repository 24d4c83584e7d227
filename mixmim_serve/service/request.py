"""One request on its way through the server: the endpoint it meets, the room it reserves, what is known of it.

All of it belongs to one event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from mixmim_serve.errors import quoted
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.options import Option

KEY = "mixmim.context"  # in the ASGI scope
STAGES = ("decode", "queue", "infer", "encode")
DRAIN_WINDOW = 10.0  # seconds over which the drain rate is measured
MAX_RETRY_AFTER = 60.0  # seconds
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Endpoint:
    """A row of the route table in app.py."""

    path: str
    method: str
    handler: Callable[[Request], Awaitable[Response]] | ASGIApp
    options: tuple[Option, ...] | None = None  # of the query string; None: it is ignored
    is_open: bool = False  # needs no API key, and writes no line in the access log
    streams: bool = False  # its body has no limit in bytes or time; each piece has one
    takes_place: bool = False  # is refused before its body is read while there is no place for an image
    is_documented: bool = True  # in the OpenAPI document


class Admission:
    """Limits the images and bytes that all requests hold together, and the share of the images of one client.

    A request without room is refused with 429. A place is taken when an image is complete: a client that sends nothing
    holds none.
    """

    def __init__(self, max_images: int, max_bytes: int, max_client_images: int, max_client_cost: float) -> None:
        self.max_images, self.max_bytes = max_images, max_bytes
        self.max_client_images, self.max_client_cost = max_client_images, max_client_cost
        self.images = 0
        self.bytes = 0
        self.client_images: Counter[str] = Counter()
        self.client_cost: dict[str, float] = {}  # pixels being decoded or waiting for it
        self._released: deque[tuple[float, int]] = deque()  # when, and how many images
        self._waiting: set[asyncio.Event] = set()  # of streams that wait for a place

    def check_room(self, client: str, images: int = 1) -> None:
        """Refuse images for which there is no room now.

        Raises:
            RequestError: 429.
        """
        if self.images + images > self.max_images:
            raise self.queue_full(f"{self.images} images are waiting already")
        if self.client_images[client] + images > self.max_client_images:
            raise self.queue_full(f"{self.client_images[client]} images of this client are waiting already")

    def check_cost(self, client: str, cost: float) -> None:
        """Refuse an image whose client already has too much to decode; one image alone always passes.

        Raises:
            RequestError: 429.
        """
        waiting = self.client_cost.get(client, 0.0)
        if waiting and waiting + cost > self.max_client_cost:
            raise self.queue_full("too many pixels of this client are waiting to be decoded already")

    def change_images(self, client: str, images: int) -> None:
        """Take places for a client's images, or give them back where the number is negative."""
        self.images += images
        self.client_images[client] += images
        if not self.client_images[client]:
            del self.client_images[client]  # so that the table does not grow with every address ever seen
        if images < 0:
            self._released.append((time.monotonic(), -images))
            if len(self._released) > 4096:  # enough for a rate over seconds
                self._released.popleft()
            self._wake()

    def change_cost(self, client: str, cost: float) -> None:
        """Count the decode cost of a client's images, or give it back where it is negative."""
        self.client_cost[client] = self.client_cost.get(client, 0.0) + cost
        if self.client_cost[client] < 0.5:  # less than a pixel is a rounding error
            del self.client_cost[client]
        if cost < 0:
            self._wake()

    async def wait_until(self, check: Callable[[], None]) -> None:
        """Wait until `check` raises no RequestError; it is called again whenever something is given back."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            while True:
                with contextlib.suppress(RequestError):
                    return check()
                event.clear()
                await event.wait()
        finally:
            self._waiting.discard(event)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()

    def queue_full(self, reason: str) -> RequestError:
        """The refusal, with the time after which there should be room."""
        wait = self.retry_after()
        headers = {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(wait * 1e3))}
        return RequestError(429, "queue_full", f"{reason}: try again in {math.ceil(wait)} s.", headers=headers)

    def retry_after(self) -> float:
        """Seconds until half of the images inside should be answered, at the current drain rate."""
        rate = self.drain_rate()
        return min(max(self.images / 2 / rate, 0.1), MAX_RETRY_AFTER) if rate else 1.0

    def drain_rate(self) -> float:
        """Images released per second, over the last `DRAIN_WINDOW` seconds."""
        now = time.monotonic()
        while self._released and self._released[0][0] < now - DRAIN_WINDOW:
            self._released.popleft()
        if not self._released:
            return 0.0
        return sum(images for _, images in self._released) / max(now - self._released[0][0], 0.1)


class Reservation:
    """The places for images and the bytes that one request holds; leaving the block gives them back."""

    def __init__(self, admission: Admission, client: str) -> None:
        self.admission, self.client, self.images, self.bytes = admission, client, 0, 0

    def reserve(self, images: int) -> None:
        """Take places for so many more images.

        Raises:
            RequestError: 429 when there is no room for them.
        """
        self.admission.check_room(self.client, images)
        self.admission.change_images(self.client, images)
        self.images += images

    async def reserve_when_free(self) -> None:
        """Wait for a place for one more image, and take it."""
        await self.admission.wait_until(lambda: self.reserve(1))

    def add_cost(self, cost: float) -> None:
        """Count the decode cost of an image, in pixels, for its client.

        Raises:
            RequestError: 429 when the images of the client cost too much together.
        """
        self.admission.check_cost(self.client, cost)
        self.admission.change_cost(self.client, cost)

    async def add_cost_when_free(self, cost: float) -> None:
        """Wait until the client's images leave room for the cost of one more, and count it."""
        await self.admission.wait_until(lambda: self.add_cost(cost))

    def remove_cost(self, cost: float) -> None:
        """Give the cost of a decoded image back."""
        self.admission.change_cost(self.client, -cost)

    def release(self, images: int, count: int) -> None:
        """Give back so many places and bytes before the request ends."""
        if images:
            self.admission.change_images(self.client, -images)
        self.admission.bytes -= count
        self.images -= images
        self.bytes -= count

    def hold(self, count: int) -> None:
        """Count so many more bytes as held in memory until they are released, or the request ends.

        Raises:
            RequestError: 429 when all requests together would hold too much.
        """
        if self.admission.bytes + count > self.admission.max_bytes:
            raise self.admission.queue_full("the memory set aside for requests in progress is full")
        self.admission.bytes += count
        self.bytes += count

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(self.images, self.bytes)


@dataclass
class RequestContext:
    """Identity, timings and outcome of one request."""

    id: str
    method: str
    path: str
    endpoint: Endpoint | None  # None for a path with a parameter, and for one that does not exist
    reservation: Reservation
    started: float = field(default_factory=time.perf_counter)
    stage_seconds: dict[str, float] = field(default_factory=dict)  # by stage, of the slowest image
    images: int = 0
    decode_cost: float = 0.0  # pixels, of all images so far
    error_code: str | None = None
    responding: bool = False  # the response has begun

    def expect_images(self, count: int) -> None:
        """Reserve a place for each of the images that the body turned out to hold.

        Raises:
            RequestError: 429 when there is no room for all of them.
        """
        self.images = count
        self.reservation.reserve(count)

    def record_stage(self, stage: str, seconds: float) -> None:
        """Images of one request run side by side, so the longest counts."""
        self.stage_seconds[stage] = max(seconds, self.stage_seconds.get(stage, 0.0))

    def server_timing(self) -> str:
        """The value of the Server-Timing header, in milliseconds."""
        spent = ((stage, self.stage_seconds[stage]) for stage in STAGES if stage in self.stage_seconds)
        return ", ".join(f"{stage};dur={seconds * 1e3:.2f}" for stage, seconds in spent)


def begin_request(scope: Scope, endpoint: Endpoint | None, admission: Admission) -> RequestContext:
    """The context of a new request, with the client's X-Request-Id where that is printable, else a random id.

    The client is known by its address here, and by its API key once that is checked.
    """
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    address = scope["client"][0] if scope.get("client") else ""
    request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
    context = RequestContext(request_id, scope["method"], scope["path"], endpoint, Reservation(admission, address))
    scope[KEY] = context
    return context


def context_of(connection: HTTPConnection) -> RequestContext:
    """The context that the middleware gave a request."""
    context: RequestContext = connection.scope[KEY]
    return context


def check_options(request: Request) -> None:
    """Refuse options that the endpoint does not declare: they are probably misspelt.

    Raises:
        RequestError: 400, naming the option and those that exist.
    """
    endpoint = context_of(request).endpoint
    names = [option.name for option in (endpoint and endpoint.options) or ()]
    for name in request.query_params:
        if name not in names:
            available = f"it takes {', '.join(names)}" if names else "it takes none"
            raise RequestError(400, "unknown_option", f"this route has no option {quoted(name)}: {available}.", name)
