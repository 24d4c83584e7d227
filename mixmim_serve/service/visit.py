"""What is known of one request while it is inside: its id, its times, how it ended."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from mixmim_serve.service.admission import Ticket

KEY = "mixmim.visit"  # in the ASGI scope
STAGES = ("decode", "queue", "infer", "encode")
_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass
class Visit:
    """One request."""

    id: str
    method: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; of several images the slowest
    images: int = 0
    code: str | None = None  # why it failed
    ticket: Ticket | None = None  # its place inside, for requests with images

    def bring(self, images: int) -> None:
        """So many images turned out to be in it: each takes a place.

        Raises:
            RequestError: 429, when there are not as many.
        """
        self.images = images
        if self.ticket:
            self.ticket.reserve(images)

    def note(self, stage: str, seconds: float) -> None:
        """Images of one request run side by side: the longest counts."""
        self.seconds[stage] = max(seconds, self.seconds.get(stage, 0.0))

    def server_timing(self) -> str:
        """The header's value, in milliseconds."""
        return ", ".join(f"{stage};dur={self.seconds[stage] * 1e3:.2f}" for stage in STAGES if stage in self.seconds)


def begin(scope: Scope) -> Visit:
    """A visit with the client's X-Request-Id, if that is printable, else an id of our own."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    visit = Visit(given if _ID.fullmatch(given) else os.urandom(16).hex(), scope["method"], scope["path"])
    scope[KEY] = visit
    return visit


def visit_of(request: HTTPConnection) -> Visit:
    """The visit that a request belongs to; a fresh one outside our server, as in a test of one part."""
    visit: Visit = request.scope.get(KEY) or begin(request.scope)
    return visit
