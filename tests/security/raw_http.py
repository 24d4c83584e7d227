"""Requests as bytes, and a connection to send them over."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

from serving import HAT, PATIENCE

GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /embed HTTP/1.1\r\ncontent-type: image/jpeg\r\ntransfer-encoding: chunked\r\n\r\n"


def head(extra: bytes = b"", path: bytes = b"/livez") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n" + extra + b"\r\n"


def photo(name: bytes = b"content-length: ", value: bytes = b"", body: bytes = HAT) -> bytes:
    """A request for the embedding of one photo."""
    value = value or str(len(body)).encode()
    return b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\n" + name + value + b"\r\n\r\n" + body


def chunks(body: bytes, size: int, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    framed = [b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(framed) + b"0\r\n" + trailers + b"\r\n"


class Peer:
    """One raw connection."""

    def __init__(self, port: int, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(("127.0.0.1", port))
        self.received = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send, even where the server has closed its end already."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def flood(self, piece: bytes, most: int) -> int:
        """Send the same piece until the server hangs up; how many bytes it took."""
        taken = 0
        with contextlib.suppress(ConnectionError):
            while taken < most:
                self.socket.sendall(piece)
                taken += len(piece)
        return taken

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next response."""
        while b"\r\n\r\n" not in self.received:
            self._receive()
        top, _, self.received = self.received.partition(b"\r\n\r\n")
        line, *rest = top.decode().split("\r\n")
        headers = dict(header.lower().split(": ", 1) for header in rest)
        length = int(headers["content-length"])
        while len(self.received) < length:
            self._receive()
        body, self.received = self.received[:length], self.received[length:]
        return int(line.split()[1]), headers, body

    def refusal(self) -> tuple[int, str]:
        """Status and code of an error that ends the connection, after a look at its shape."""
        status, headers, body = self.response()
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"].count(". ") == 0
        assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
        assert self.is_closed()
        return status, error["code"]

    def is_closed(self) -> bool:
        """Whether the server ends the connection now, without another word."""
        try:
            return not self.received and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def is_reset(self) -> bool:
        """Whether the server drops the connection with what it has not sent yet."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            return True
        return False

    def _receive(self) -> None:
        piece = self.socket.recv(65536)
        assert piece, f"the server hung up after {self.received[:200]!r}"
        self.received += piece


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
