"""POST /embed/stream: thousands of images over one connection, answered in order while they arrive.

In: NDJSON, a line `{"input": "data:image/jpeg;base64,...", "id": anything}`, or a multipart form with files `image`.
Out: NDJSON, a line `{"index", "id", "status", "embedding" | "error"}` an image.

Reading, the engine and writing go on side by side, and each waits for the next: memory is bounded by the window.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from mixmim_serve.errors import ImageError
from mixmim_serve.service import query
from mixmim_serve.service.answers import DTYPES, entry
from mixmim_serve.service.body import body_of, pieces
from mixmim_serve.service.encoding import json_bytes
from mixmim_serve.service.intake import KEY, form_files, from_base64, media_type
from mixmim_serve.service.problems import RequestError, describe, refused
from mixmim_serve.service.routes.images import embedding, runtime_of
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.visit import visit_of

NDJSON = "application/x-ndjson"
KINDS = (NDJSON, "application/ndjson", "application/jsonl", "multipart/form-data")
LINES_AHEAD = 4096  # answers kept for a client that sends everything before it reads
UNLIMITED = 2**62


@dataclass(frozen=True)
class Given:
    """One image of a stream."""

    index: int
    image: bytes | RequestError
    id: Any = None


class Stream:
    """One connection."""

    def __init__(self, request: Request, runtime: Runtime) -> None:
        query.only(request, "normalize", "dtype")
        self.request, self.runtime, self.visit = request, runtime, visit_of(request)
        self.unit = query.switch(request, "normalize")
        self.dtype = DTYPES[query.choice(request, "dtype", "float32", tuple(DTYPES))]
        window = min(runtime.settings.stream_window, runtime.settings.max_waiting)
        if self.visit.ticket:
            self.visit.ticket.reserve(window)
        self.answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(window)
        self.lines: asyncio.Queue[bytes] = asyncio.Queue(LINES_AHEAD)

    async def run(self, send: Send) -> None:
        """Read, work and write until the end of the body.

        Raises:
            RequestError, ClientDisconnect: when the body breaks off; what was answered stays answered.
        """
        headers = [(b"content-type", NDJSON.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(group))
            group.create_task(self._finish())
            await self._write(send)

    async def _read(self, group: asyncio.TaskGroup) -> None:
        """Begin with each image as it arrives; a body that breaks off is the last line."""
        try:
            async for given in self._images():
                self.visit.images += 1
                await self.answers.put(group.create_task(self._answer(given)))
        except (RequestError, ClientDisconnect) as error:
            self.visit.code = describe(error)[1]["code"]
            await self.answers.put(group.create_task(_last_line(error)))
        await self.answers.put(None)

    async def _finish(self) -> None:
        """In order, whichever is ready first."""
        while (task := await self.answers.get()) is not None:
            await self.lines.put(await task)
        await self.lines.put(b"")

    async def _write(self, send: Send) -> None:
        """Whatever is ready goes out together; an empty line is the end.

        Raises:
            RequestError: 408, when the client does not read.
        """
        ended = False
        while not ended:
            gathered = [await self.lines.get()]
            while not self.lines.empty():
                gathered.append(self.lines.get_nowait())
            ended = gathered[-1] == b""
            try:
                async with asyncio.timeout(self.runtime.settings.body_seconds):
                    await send({"type": "http.response.body", "body": b"".join(gathered), "more_body": not ended})
            except TimeoutError as error:
                raise RequestError(408, "not_read", "the answers are not read.") from error

    def _images(self) -> AsyncIterator[Given]:
        return self._form() if media_type(self.request) == "multipart/form-data" else self._ndjson()

    async def _form(self) -> AsyncIterator[Given]:
        index = 0
        async for part in form_files(self.request, self.runtime.settings, UNLIMITED):
            yield Given(index, part.data)
            index += 1

    async def _ndjson(self) -> AsyncIterator[Given]:
        longest = self.runtime.settings.max_image_bytes * 4 // 3 + 1024
        index = 0
        async for line in _lines(pieces(body_of(self.request)), longest):
            if line.strip():
                yield _parse(index, line)
                index += 1

    async def _answer(self, given: Given) -> bytes:
        """One line."""
        head = {"index": given.index} | ({} if given.id is None else {"id": given.id})
        try:
            if isinstance(given.image, RequestError):
                raise given.image
            outputs = await self.runtime.encode(given.image, ["embedding"], self.visit)
            body = entry(embedding(outputs, unit=self.unit), self.dtype)
        except ImageError as error:
            body = entry(refused(error, f"input[{given.index}]"), self.dtype)
        except Exception as error:  # the engine failed on this one; the stream goes on
            body = {"status": "error", "error": describe(error)[1]}
        if body["status"] == "error":
            self.runtime.metrics.fail(body["error"]["code"])
        return json_bytes(head | body) + b"\n"


class EmbedStream:
    """The route; an ASGI app, because it reads and writes at once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            RequestError: before the first line, for a body of another type or options that do not exist.
        """
        request = Request(scope, receive)
        if request.method != "POST":
            raise RequestError(405, "method", "send images with POST.", headers={"Allow": "POST"})
        kind = media_type(request)
        if kind not in KINDS:
            message = f"content type {kind or 'missing'!r} is none of {', '.join(KINDS)}."
            raise RequestError(415, "unsupported_body", message)
        stream = Stream(request, runtime_of(request))
        body_of(request).be_stream()
        await stream.run(send)


async def _lines(found: AsyncIterator[bytes], longest: int) -> AsyncIterator[bytes]:
    """Lines of a body, the last one with or without its end.

    Raises:
        RequestError: 413 for a line without end.
    """
    rest = bytearray()
    async for piece in found:
        *whole, tail = piece.split(b"\n")
        for line in whole:
            rest += line
            yield bytes(rest)
            rest.clear()
        rest += tail
        if len(rest) > longest:
            raise RequestError(413, "line_too_long", f"a line is above {longest:,} bytes: send smaller images.")
    if rest:
        yield bytes(rest)


def _parse(index: int, line: bytes) -> Given:
    param = f"input[{index}]"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return Given(index, RequestError(400, "malformed_json", "the line is no JSON.", param))
    if not isinstance(value, dict) or value.keys() - {KEY, "id"} or KEY not in value:
        sentence = f'a line must be an object with {KEY!r}, and "id" if you like.'
        return Given(index, RequestError(400, "malformed_json", sentence, param))
    try:
        return Given(index, from_base64(value[KEY], param), value.get("id"))
    except RequestError as error:
        return Given(index, error, value.get("id"))


async def _last_line(error: Exception) -> bytes:
    return json_bytes({"status": "broken_off", "error": describe(error)[1]}) + b"\n"
