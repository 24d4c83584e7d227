"""A request's body as it arrives: bounded in size, in time and in what all requests hold together; and forms in it.

Forms are split by python-multipart and kept in memory. Starlette's own reader writes parts above 1 MB to the disk, so
that a full disk would fail requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.request import RequestContext
from mixmim_serve.service.settings import Settings

KEY = "mixmim.body"  # in the ASGI scope
MAX_HEADER_BYTES = 16_384  # of one part of a form


class Body:
    """Wraps ASGI's `receive` with the limits of `settings`."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings, context: RequestContext) -> None:
        self.receive, self.settings, self.context = receive, settings, context
        self.limit: float = settings.max_body_bytes
        self.deadline = asyncio.get_running_loop().time() + settings.body_seconds
        self.received = 0
        self.complete = asyncio.Event()
        self.streamed = False
        self.unclaimed = 0  # bytes of a stream that no image was made of yet; held, so that they count
        self._content_length = dict(scope["headers"]).get(b"content-length", b"0")

    def check_content_length(self) -> None:
        """Refuse at once a body that announces more bytes than allowed.

        Raises:
            RequestError: 413.
        """
        if self._content_length.isdigit() and int(self._content_length) > self.limit:
            raise self._too_large()

    def make_stream(self) -> None:
        """Drop the limit on the whole body: from here on each piece has its own time."""
        self.limit, self.streamed = float("inf"), True

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            RequestError: 413 for too many bytes, 408 for too slow, 429 when all requests together hold too much.
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
        self.received += size
        if self.received > self.limit:
            raise self._too_large()
        self.context.reservation.hold(size)
        self.unclaimed += size
        if not message.get("more_body", False):
            self.complete.set()
        return message

    def claim(self) -> int:
        """The bytes received since the last call, which whoever made an image of them must release."""
        claimed, self.unclaimed = self.unclaimed, 0
        return claimed

    async def wait_for_disconnect(self) -> None:
        """Wait until the client is gone, once its body is complete."""
        await self.complete.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def _too_large(self) -> RequestError:
        message = f"the body is above {int(self.limit) / 2**20:g} MiB: send fewer or smaller images."
        return RequestError(413, "body_too_large", message)

    def _too_slow(self) -> RequestError:
        event = "nothing arrived" if self.streamed else "the body was not complete"
        message = f"{event} within {self.settings.body_seconds:g} s: send it faster, or send less."
        return RequestError(408, "body_too_slow", message, headers={"Connection": "close"})


def body_of(request: Request) -> Body:
    """The body that the middleware gave a POST request."""
    body: Body = request.scope[KEY]
    return body


async def stream_chunks(body: Body) -> AsyncIterator[bytes]:
    """The body, chunk by chunk.

    Starlette's `request.stream()` does the same, but nothing else may call `receive` while a response is written.

    Raises:
        ClientDisconnect: when the client disconnects before the end.
    """
    while True:
        message = await body()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return


@dataclass
class Part:
    """One part of a form."""

    name: str
    is_file: bool
    data: bytes


class _PartCollector:
    """The parser's callbacks; complete parts collect in `complete`."""

    def __init__(self, boundary: bytes, max_part: int) -> None:
        self.complete: list[Part] = []
        self.ended = self._begun = False
        self.max_part = max_part
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._data = bytearray()
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        self.parser = MultipartParser(boundary, {f"on_{name}": getattr(self, f"_{name}") for name in names})  # type: ignore[arg-type]

    def write(self, chunk: bytes) -> None:
        """Parse the next bytes of the body.

        Newlines before the first boundary are dropped here: python-multipart would then skip any text up to the next
        hyphen of the chunk, so that one body is accepted or refused depending on how the network cut it.
        """
        if not self._begun:
            chunk = chunk.lstrip(b"\r\n")
            self._begun = bool(chunk)
        self.parser.write(chunk)

    def _part_begin(self) -> None:
        self._headers, self._data, self._header_bytes = {}, bytearray(), 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise FormParserError("headers too long")

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        room = self.max_part + 1 - len(self._data)  # one byte more than allowed, for `decode` to refuse it
        self._data += data[start : min(end, start + max(room, 0))]

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self.complete.append(Part(name, b"filename" in options, bytes(self._data)))
        self._data = bytearray()

    def _end(self) -> None:
        self.ended = True


async def split_form(chunks: AsyncIterator[bytes], content_type: str, max_part: int) -> AsyncIterator[Part]:
    """The parts of a multipart form in order, each as soon as it is complete; longer parts are cut at `max_part` + 1.

    Raises:
        RequestError: 400 for a body that is not a multipart form, or that ends too early.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("the content type names no boundary")
    try:
        collector = _PartCollector(boundary, max_part)
        async for chunk in chunks:
            collector.write(chunk)
            for part in collector.complete:
                yield part
            collector.complete.clear()
        collector.parser.finalize()
    except FormParserError as error:
        raise _malformed("it cannot be split into parts") from error
    if not collector.ended:
        raise _malformed("it ends within a part")


def _malformed(reason: str) -> RequestError:
    message = f"the body is not a valid multipart form ({reason}): send it as curl -F does."
    return RequestError(400, "malformed_form", message)
