"""One request on its way through the server: the endpoint it meets, the room it reserves, what is known of it.

All of it belongs to one event loop, so nothing is locked.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
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
    takes_place: bool = False  # reserves a place for an image before its body is read
    is_documented: bool = True  # in the OpenAPI document


class Admission:
    """Limits the images and bytes that all requests hold together; a request without room is refused with 429."""

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images = 0
        self.bytes = 0
        self._released: deque[tuple[float, int]] = deque()  # when, and how many images

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

    def release(self, images: int, held: int) -> None:
        """Give back the places and bytes of one request."""
        self.images -= images
        self.bytes -= held
        if images:
            self._released.append((time.monotonic(), images))
        if len(self._released) > 4096:  # enough for a rate over seconds
            self._released.popleft()


class Reservation:
    """The places for images and the bytes that one request holds; leaving the block gives them back."""

    def __init__(self, admission: Admission) -> None:
        self.admission, self.images, self.bytes = admission, 0, 0

    def reserve(self, images: int) -> None:
        """Hold places for so many images in all.

        Raises:
            RequestError: 429 when there is no room for those that are new.
        """
        new = images - self.images
        if self.admission.images + new > self.admission.max_images:
            others = self.admission.images - self.images
            raise self.admission.queue_full(f"{others} images are waiting already")
        self.admission.images += new
        self.images = images

    def hold(self, count: int) -> None:
        """Count so many more bytes as held in memory until the request ends.

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
        self.admission.release(self.images, self.bytes)
        self.images = self.bytes = 0


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
    """The context of a new request, with the client's X-Request-Id where that is printable, else a random id."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
    context = RequestContext(request_id, scope["method"], scope["path"], endpoint, Reservation(admission))
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
