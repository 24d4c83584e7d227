"""Multipart bodies, read as they arrive and kept in memory; python-multipart splits them.

Starlette's own reader writes parts above 1 MB to the disk, so that a full disk would fail requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mixmim_serve.service.problems import RequestError

MAX_HEADER_BYTES = 16_384  # of one part
MAX_FIELDS = 32  # parts that are no images


@dataclass
class Part:
    """One part of a form."""

    name: str
    is_file: bool
    data: bytes


class _Parts:
    """What the parser calls; whole parts pile up in `done`."""

    def __init__(self, boundary: bytes, max_part: int) -> None:
        self.done: list[Part] = []
        self.ended = False
        self.max_part = max_part
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._data = bytearray()
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        self.parser = MultipartParser(boundary, {f"on_{name}": getattr(self, f"_{name}") for name in names})  # type: ignore[arg-type]

    def _part_begin(self) -> None:
        self._headers, self._data, self._header_bytes = {}, bytearray(), 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, size: int) -> None:
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
        self.done.append(Part(name, b"filename" in options, bytes(self._data)))
        self._data = bytearray()

    def _end(self) -> None:
        self.ended = True


async def parts(pieces: AsyncIterator[bytes], content_type: str, max_part: int) -> AsyncIterator[Part]:
    """The parts of a form, in order, each as soon as it is whole; of a longer part `max_part` bytes and one are kept.

    Raises:
        RequestError: 400 for a body that is no multipart form, or ends too early.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("the content type names no boundary")
    try:
        found = _Parts(boundary, max_part)
        async for piece in pieces:
            found.parser.write(piece)
            for part in found.done:
                yield part
            found.done.clear()
        found.parser.finalize()
    except FormParserError as error:
        raise _malformed("its parts cannot be told apart") from error
    if not found.ended:
        raise _malformed("it ends within a part")


def _malformed(reason: str) -> RequestError:
    return RequestError(400, "malformed_form", f"the body is no multipart form ({reason}): send it as curl -F does.")
