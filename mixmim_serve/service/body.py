"""A request's body as it arrives: bounded in size, in time and in what all requests hold together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from mixmim_serve.service.problems import RequestError
from mixmim_serve.service.settings import Settings
from mixmim_serve.service.visit import Visit

KEY = "mixmim.body"  # in the ASGI scope


class Body:
    """Stands in for ASGI's `receive`."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings, visit: Visit) -> None:
        self.receive, self.settings, self.visit = receive, settings, visit
        self.limit: float = settings.max_body_bytes
        self.deadline = asyncio.get_running_loop().time() + settings.body_seconds
        self.read = 0
        self.complete = asyncio.Event()
        self.streamed = False
        self._announced = dict(scope["headers"]).get(b"content-length", b"0")

    def check_announced(self) -> None:
        """Refuse at once a body that says itself that it is too large.

        Raises:
            RequestError: 413.
        """
        if self._announced.isdigit() and int(self._announced) > self.limit:
            raise self._too_large()

    def be_stream(self) -> None:
        """From here on the body has no end of its own: each piece has its own time, nothing is counted as held."""
        self.limit, self.streamed = float("inf"), True

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            RequestError: 413 for too much, 408 for too slow, 429 when all requests together hold too much.
        """
        if self.complete.is_set():
            return await self.receive()
        if self.streamed:
            self.deadline = asyncio.get_running_loop().time() + self.settings.body_seconds
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError as error:
            raise self._too_slow() from error
        size = len(message.get("body", b""))
        self.read += size
        if self.read > self.limit:
            raise self._too_large()
        if self.visit.ticket and not self.streamed:
            self.visit.ticket.hold(size)
        if not message.get("more_body", False):
            self.complete.set()
        return message

    async def left(self) -> None:
        """Wait until the client is gone, once its body is complete."""
        await self.complete.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def _too_large(self) -> RequestError:
        message = f"the body is above {int(self.limit) / 2**20:g} MiB: send fewer or smaller images."
        return RequestError(413, "body_too_large", message)

    def _too_slow(self) -> RequestError:
        what = "nothing arrived" if self.streamed else "the body was not complete"
        message = f"{what} within {self.settings.body_seconds:g} s: send it faster, or less of it."
        return RequestError(408, "body_too_slow", message, headers={"Connection": "close"})


def body_of(request: Request) -> Body:
    """The body of a request that came through `Front`."""
    body: Body = request.scope[KEY]
    return body


async def pieces(body: Body) -> AsyncIterator[bytes]:
    """A stream's body, piece by piece.

    Starlette's `request.stream()` would do, but whoever answers meanwhile must not call `receive` too.

    Raises:
        ClientDisconnect: when the client leaves before the end.
    """
    while True:
        message = await body()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return
