"""HTTP/1.1 with limits on headers, framing, connections and slow readers, of which uvicorn's protocol has none.

What arrives is handed to the parser in slices that end where a head or a body ends, so that heads are measured before
they are parsed, and a pipelined request is not looked at until the one before it is answered. The slices decide nothing
else: where a request really ends, only the parser says.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mixmim_serve.service.connections import Connections, Place
from mixmim_serve.service.errors import RequestError, describe_error
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.settings import Settings

BLANK = b"\r\n\r\n"  # ends a head, and a chunked body
SLICE = 16_384  # bytes of a chunked body between two looks at its framing
FRAMING_SHARE = 4  # bytes of a chunked body for each byte of sizes, extensions and trailers, beyond `max_header_bytes`
MAX_UNPARSED = 65_536  # bytes of pipelined requests that wait; above that the connection is not read
WRITE_BUFFER = 65_536  # bytes of answers that wait for a client; above that it is a slow reader
RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: closing drops what the kernel has not sent yet
LINGER_SECONDS = 1.0  # for a client to read why it was refused, before its connection is closed


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `protocol_class` makes the subclass that has the first three."""

    settings: Settings
    metrics: Metrics
    open_connections: Connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._place: Place  # in `open_connections`
        self._unparsed = b""
        self._ended = False  # nothing more is read
        self._timer: asyncio.TimerHandle | None = None  # of the head, of a body nobody reads, or of the close
        self._send_timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def _expect_head(self) -> None:
        """Start from nothing with the next request."""
        self._in_head, self._arrived = True, False  # `_arrived`: the whole request has
        self._head_bytes = self._line_bytes = self._lines = 0
        self._body_left, self._chunked = 0, False  # `_body_left`: of a Content-Length
        self._framing = self._framing_run = 0  # bytes of sizes, extensions, trailers: beyond the share, and in a row
        self._tail = b""  # the last bytes of the slice before, which may hold half of a BLANK

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection, or start the timer of its first head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._place = self.open_connections.enter(self.client[0] if self.client else None)
        if self._place.error is None:
            self._set_timer(self.settings.header_seconds, self._head_too_slow)
            return
        self.metrics.connections_refused.inc()
        self._ended = True
        if self._place.may_linger:
            self._refuse(self._place.error)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and wake the request that it belongs to."""
        self._ended, self._unparsed = True, b""
        self.open_connections.leave(self._place)
        self._cancel_timer()
        self._cancel_send_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """No further request came in time."""
        self._close()

    def _close(self) -> None:
        """Close once everything is sent; a client that does not read it has `send_seconds`."""
        if not self.transport.is_closing():
            self.transport.close()
        self._set_timer(self.settings.send_seconds, self.transport.abort)

    def _set_timer(self, seconds: float, action: Any) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Reading

    def data_received(self, data: bytes) -> None:
        """Read requests up to the first that is not answered yet, and keep the rest."""
        if self._ended:
            return
        self._unset_keepalive_if_required()
        if self._is_lone_head(data):
            self._parse(data)
            return
        self._unparsed = self._unparsed + data if self._unparsed else data
        self._advance()

    def _is_lone_head(self, data: bytes) -> bool:
        """Whether this is a whole head within the limits and nothing else, as most requests come: no need to count."""
        if not self._in_head or self._head_bytes or data[0] in BLANK or data.find(BLANK) != len(data) - 4:
            return False
        settings = self.settings
        is_short = len(data) <= min(settings.max_request_line, settings.max_header_bytes)
        return is_short and data.count(b"\n") <= settings.max_headers + 2

    def _advance(self) -> None:
        data, start = self._unparsed, 0
        while start < len(data) and not self._ended and not self._arrived:
            end = self._slice_end(data, start)
            self._feed(data, start, end)
            start = end
        self._unparsed = b"" if self._ended else data[start:]
        if len(self._unparsed) > MAX_UNPARSED:
            self.flow.pause_reading()
        elif self._in_head and not self._ended:
            self._await_head()

    def _await_head(self) -> None:
        """Start the timer of a head that has begun, or of an idle connection."""
        if not self._head_bytes:
            self._unset_keepalive_if_required()
            handler = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handler)
        elif self._timer is None:
            self._set_timer(self.settings.header_seconds, self._head_too_slow)

    def _slice_end(self, data: bytes, start: int) -> int:
        """Where the head or the body that begins or goes on at `start` may end."""
        if self._body_left:
            return min(start + self._body_left, len(data))
        if self._tail:
            seam = self._tail + data[start : start + 3]
            if (found := seam.find(BLANK)) >= 0:
                return start + found + 4 - len(self._tail)
        found = data.find(BLANK, start)
        return min(found + 4 if found >= 0 else len(data), start + SLICE)

    def _feed(self, data: bytes, start: int, end: int) -> None:
        """Hand one slice to the parser, unless it goes beyond a limit."""
        if self._in_head and (error := self._check_head(data, start, end)):
            self._fail(error)
            return
        if self._body_left:
            self._body_left -= end - start
        else:
            self._tail = (self._tail + data[max(start, end - 3) : end])[-3:]
        if self._chunked:
            self._framing += end - start
            self._framing_run += end - start
        self._parse(data if end - start == len(data) else memoryview(data)[start:end])
        if self._chunked and not self._ended and (error := self._check_framing()):
            self._fail(error)

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # is not offered: answer as usual, then close
            self.cycle.keep_alive, self._ended = False, True
        except httptools.HttpParserError:
            self._fail(RequestError(400, "malformed_request", "this is not a valid HTTP/1.1 request."))

    def _check_head(self, data: bytes, start: int, end: int) -> RequestError | None:
        """Count a slice of a head; the error if it is too large."""
        settings = self.settings
        self._head_bytes += end - start
        if not self._lines:
            if data[start] in BLANK and not self._line_bytes:  # line ends before a request are skipped
                start = end - len(data[start:end].lstrip(BLANK))
            newline = data.find(b"\n", start, end)
            self._line_bytes += (end if newline < 0 else newline) - start
        self._lines += data.count(b"\n", start, end)
        if self._line_bytes > settings.max_request_line:
            message = f"the request line is above {settings.max_request_line:,} bytes: send shorter options."
            return RequestError(414, "request_line_too_long", message)
        if self._head_bytes - self._line_bytes > settings.max_header_bytes:
            message = f"the headers are above {settings.max_header_bytes:,} bytes: send fewer or shorter ones."
            return RequestError(431, "headers_too_large", message)
        if self._lines > settings.max_headers + 2:
            message = f"the request has more than {settings.max_headers} headers: send fewer."
            return RequestError(431, "too_many_headers", message)
        return None

    def _check_framing(self) -> RequestError | None:
        """The error for a chunked body that is mostly chunk sizes, extensions or trailers."""
        limit = self.settings.max_header_bytes
        self._framing = max(self._framing, -limit)
        if self._framing_run <= limit and self._framing <= limit:
            return None
        message = "the body has too many small chunks, chunk extensions or trailers: send chunks of 1 kB or more."
        return RequestError(400, "too_much_framing", message)

    def _head_too_slow(self) -> None:
        """No head in time: 408, or nothing on a connection that was never used."""
        if not self._head_bytes:
            self._close()
            return
        message = f"the headers were not complete within {self.settings.header_seconds:g} s: send them faster."
        self._fail(RequestError(408, "headers_too_slow", message))

    # The parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers are dropped, because they would become headers of a request that runs already."""
        if not self._in_head:
            return
        name = name.lower()
        self.headers.append((name, value))
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue" or self.expect_100_continue
        elif name == b"content-length":
            self._body_left = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True

    def on_headers_complete(self) -> None:
        """Start the request."""
        self._cancel_timer()
        super().on_headers_complete()
        self._in_head, self._tail = False, b""

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        if self._chunked:
            self._framing -= len(body) + len(body) // FRAMING_SHARE
            self._framing_run = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the answer, unless it came before the end of the body."""
        super().on_message_complete()
        if self.cycle.response_complete:
            self._cancel_timer()
            self._expect_head()
        else:
            self._arrived = True

    # Answers

    def on_response_complete(self) -> None:
        """Go on with the next request; a body that nobody read has `body_seconds` to end."""
        self.server_state.total_requests += 1
        self.cycle.body = bytearray()
        if self.transport.is_closing():
            self._close()
            return
        self.flow.resume_reading()
        if not self._arrived:
            self._set_timer(self.settings.body_seconds, self._close)
            return
        self._expect_head()
        if self._unparsed:
            self._advance()
        else:
            self._await_head()

    def pause_writing(self) -> None:
        """The client does not read: it has `send_seconds` for what waits."""
        super().pause_writing()
        self._cancel_send_timer()
        self._send_timer = self.loop.call_later(self.settings.send_seconds, self._not_read)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._cancel_send_timer()
        super().resume_writing()

    def _cancel_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _not_read(self) -> None:
        self.metrics.count_failure("not_read")
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _fail(self, error: RequestError) -> None:
        """Refuse the request that is being read, and close. Whatever came before it on this connection is answered."""
        if self.transport.is_closing():
            return
        self._ended = True
        self.metrics.count_failure(error.code)
        cycle = self.cycle
        if not self._in_head and not cycle.response_complete:
            cycle.disconnected = True  # which ends the request
            cycle.message_event.set()
        if not self._in_head and cycle.response_started:
            self._close()
            return
        self._refuse(error)

    def _refuse(self, error: RequestError) -> None:
        """Send an error, then drop what comes for a while: closing with bytes unread could take the answer back."""
        self.transport.write(self._response(error))
        self.flow.resume_reading()
        self.transport.write_eof()
        self._set_timer(LINGER_SECONDS, self.transport.abort)

    def _response(self, error: RequestError) -> bytes:
        """The error as a whole response that ends the connection."""
        status, fields = describe_error(error)
        body = orjson.dumps({"error": fields})
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | error.headers).items()]
        lines += [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        return STATUS_LINE[status] + b"".join(lines) + b"\r\n" + body


def protocol_class(settings: Settings, metrics: Metrics) -> type[LimitedProtocol]:
    """The protocol of one server: its connections share their limits and metrics."""
    connections = Connections(settings)
    metrics.watch_connections(lambda: connections.total)
    shared = {"settings": settings, "metrics": metrics, "open_connections": connections}
    return cast(type[LimitedProtocol], type("Protocol", (LimitedProtocol,), shared))
