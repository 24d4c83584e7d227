"""POST /embed/stream: thousands of images over one connection, answered in order while they arrive.

In: NDJSON, a line `{"input": "data:image/jpeg;base64,...", "id": "a.jpg"}`, or a multipart form with files `image`.
Out: NDJSON, one line `{"index", "id", "status", "embedding" | "error"}` per image.

Reading, inference and writing overlap, and each waits for the next: the window bounds memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from mixmim_serve.errors import ImageError, quoted
from mixmim_serve.service.body import body_of, stream_chunks
from mixmim_serve.service.bounded_json import load_json
from mixmim_serve.service.errors import RequestError, describe_error, image_refused
from mixmim_serve.service.options import DTYPE, NORMALIZE
from mixmim_serve.service.request import check_options, context_of
from mixmim_serve.service.responses import FLOAT_TYPES, cast_floats, json_bytes, json_entry
from mixmim_serve.service.routes.images import embedding, runtime_of
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.uploads import KEY, form_images, from_base64, media_type

NDJSON = "application/x-ndjson"
MEDIA_TYPES = (NDJSON, "application/ndjson", "application/jsonl", "multipart/form-data")
MAX_UNREAD_LINES = 4096  # answers kept for a client that sends everything before it reads
MAX_ID = 1024  # characters, which the answer repeats
UNLIMITED = 2**62

StreamId = str | int | float | None


@dataclass(frozen=True)
class StreamedImage:
    """One image of a stream, or why there is none."""

    index: int
    image: bytes | RequestError
    id: StreamId = None


class EmbedSession:
    """One connection: a reader, one task per image in the window, and a writer."""

    def __init__(self, request: Request, runtime: Runtime) -> None:
        check_options(request)
        self.request, self.runtime, self.context = request, runtime, context_of(request)
        self.unit_length = NORMALIZE.read(request)
        self.dtype = FLOAT_TYPES[DTYPE.read(request)]
        self.body = body_of(request)
        window = runtime.settings.stream_window
        self.answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(window)
        self.lines: asyncio.Queue[bytes] = asyncio.Queue(MAX_UNREAD_LINES)

    async def run(self, send: Send) -> None:
        """Read, infer and write until the end of the body.

        Raises:
            RequestError, ClientDisconnect: when the body breaks off; lines already written stay valid.
        """
        headers = [(b"content-type", NDJSON.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(group))
            group.create_task(self._collect())
            await self._write(send)

    async def _read(self, group: asyncio.TaskGroup) -> None:
        """Start on each image as it arrives; if the body breaks off, the last line says why."""
        try:
            images = self._images()
            while (streamed := await self._next_image(images)) is not None:
                size = self.body.claim()
                await self.context.reservation.reserve_when_free()
                self.context.images += 1
                await self.answers.put(group.create_task(self._answer(streamed, size)))
        except (RequestError, ClientDisconnect) as error:
            self.context.error_code = describe_error(error)[1]["code"]
            await self.answers.put(group.create_task(_last_line(error)))
        await self.answers.put(None)

    async def _next_image(self, images: AsyncIterator[StreamedImage]) -> StreamedImage | None:
        """The next image, or None at the end of the body.

        Raises:
            RequestError: 408 when no image is complete in time.
        """
        seconds = self.runtime.settings.stream_idle_seconds
        try:
            async with asyncio.timeout(seconds):
                return await anext(images, None)
        except TimeoutError as error:
            raise RequestError(408, "stream_idle", f"no complete image within {seconds:g} s: send faster.") from error

    async def _collect(self) -> None:
        """Put answers in the order of their images."""
        while (task := await self.answers.get()) is not None:
            await self.lines.put(await task)
        await self.lines.put(b"")

    async def _write(self, send: Send) -> None:
        """Send all lines that are ready at once; an empty line is the end.

        Raises:
            RequestError: 408 when the client does not read.
        """
        ended = False
        while not ended:
            ready = [await self.lines.get()]
            while not self.lines.empty():
                ready.append(self.lines.get_nowait())
            ended = ready[-1] == b""
            try:
                async with asyncio.timeout(self.runtime.settings.body_seconds):
                    await send({"type": "http.response.body", "body": b"".join(ready), "more_body": not ended})
            except TimeoutError as error:
                raise RequestError(408, "not_read", "the client does not read its answers.") from error

    def _images(self) -> AsyncIterator[StreamedImage]:
        return self._form() if media_type(self.request) == "multipart/form-data" else self._ndjson()

    async def _form(self) -> AsyncIterator[StreamedImage]:
        index = 0
        async for part in form_images(self.request, self.runtime.settings, UNLIMITED):
            yield StreamedImage(index, part.data)
            index += 1

    async def _ndjson(self) -> AsyncIterator[StreamedImage]:
        longest = self.runtime.settings.max_image_bytes * 4 // 3 + 1024
        index = 0
        async for line in split_lines(stream_chunks(self.body), longest):
            if line.strip():
                yield parse_line(index, line)
                index += 1

    async def _answer(self, streamed: StreamedImage, size: int) -> bytes:
        """The line of one image; afterwards its place and its `size` bytes are free."""
        try:
            return await self._embed(streamed)
        finally:
            self.context.reservation.release(1, size)

    async def _embed(self, streamed: StreamedImage) -> bytes:
        head = {"index": streamed.index} | ({} if streamed.id is None else {"id": streamed.id})
        try:
            if isinstance(streamed.image, RequestError):
                raise streamed.image
            arrays = await self.runtime.encode(streamed.image, ["embedding"], self.context)
            vector = embedding(arrays, unit_length=self.unit_length)
            entry = json_entry(cast_floats(vector, self.dtype, f"input[{streamed.index}]"))
        except ImageError as error:
            entry = json_entry(image_refused(error, f"input[{streamed.index}]"))
        except Exception as error:  # the engine failed on this image; the stream continues
            entry = {"status": "error", "error": describe_error(error)[1]}
        if entry["status"] == "error":
            self.runtime.metrics.count_failure(entry["error"]["code"])
        return json_bytes(head | entry) + b"\n"


class EmbedStream:
    """The route; an ASGI app, because it reads and writes at the same time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            RequestError: before the first line, for another method, a body of another type or unknown options.
        """
        request = Request(scope, receive)
        if request.method != "POST":
            raise RequestError(405, "method", "send images with POST.", headers={"Allow": "POST"})
        kind = media_type(request)
        if kind not in MEDIA_TYPES:
            message = f"content type {quoted(kind or 'missing')} is not accepted: send one of {', '.join(MEDIA_TYPES)}."
            raise RequestError(415, "unsupported_body", message)
        session = EmbedSession(request, runtime_of(request))
        session.body.make_stream()
        await session.run(send)


embed_stream = EmbedStream()


async def split_lines(chunks: AsyncIterator[bytes], longest: int) -> AsyncIterator[bytes]:
    """The lines of a body; the last one may lack its line end.

    Raises:
        RequestError: 413 for a line of more than `longest` bytes.
    """
    rest = bytearray()
    async for chunk in chunks:
        *ended, tail = chunk.split(b"\n")
        for line in ended:
            rest += line
            yield bytes(rest)
            rest.clear()
        rest += tail
        if len(rest) > longest:
            raise RequestError(413, "line_too_long", f"a line is above {longest:,} bytes: send smaller images.")
    if rest:
        yield bytes(rest)


def parse_line(index: int, line: bytes) -> StreamedImage:
    """One line of NDJSON; a line that cannot be used gives its error in place of the image."""
    param = f"input[{index}]"
    try:
        value = load_json(line)
    except RequestError as error:
        return StreamedImage(index, RequestError(error.status, error.code, f"the line {error}.", param))
    if not isinstance(value, dict) or value.keys() - {KEY, "id"} or KEY not in value:
        message = f'a line must be an object with {KEY!r} and, optionally, "id".'
        return StreamedImage(index, RequestError(400, "malformed_json", message, param))
    id_ = value.get("id")
    if not isinstance(id_, StreamId) or (isinstance(id_, str) and len(id_) > MAX_ID):
        expected = f"a string of at most {MAX_ID} characters, a number, true, false or null"
        message = f"id must be {expected}, got {quoted(id_)}."
        return StreamedImage(index, RequestError(400, "bad_id", message, param))
    try:
        return StreamedImage(index, from_base64(value[KEY], param), id_)
    except RequestError as error:
        return StreamedImage(index, error, id_)


async def _last_line(error: Exception) -> bytes:
    return json_bytes({"status": "broken_off", "error": describe_error(error)[1]}) + b"\n"
