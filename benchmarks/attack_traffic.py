"""The traffic of the attacks of `benchmarks/attacks.py`; it runs as a process of its own, at low priority.

    python -m benchmarks.attack_traffic FOLDER PORT SOURCE KEY SECONDS ATTACK...

Each attack has a number of threads, which repeat one step until the time is up or standard input closes; a step of
which the server has refused all pauses for `PAUSE` seconds. FOLDER holds the files of `benchmarks/attack_files.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NICENESS = 10  # in earnest this traffic comes from other machines; at 19 a busy server would starve it
PAUSE = 0.05  # seconds between two steps of a thread
PIECE = 262_144  # bytes sent or received at once
JSON = "application/json"
BOUNDARY = "nn7x"
PATTERNS = ("{0..999}{0..999}{0..999}*", "{0..20000000}.jpg", "{a,b}" * 40 + "*", "*/" * 200 + "{0..999999}")


@dataclass
class Target:
    """The server, and how to reach it."""

    folder: Path  # of the files
    port: int
    source: str  # the address that the attack comes from
    key: str  # the API key that it has; empty for none
    ended: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def connect(self, receive_buffer: int = 0) -> Iterator[socket.socket]:
        """A connection from the source address."""
        with socket.socket() as connection:
            if receive_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(5)
            connection.bind((self.source, 0))
            connection.connect(("127.0.0.1", self.port))
            yield connection

    def head(self, method: str, path: str, *headers: str) -> bytes:
        """The lines before a body."""
        keyed = [f"authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *keyed, *headers, "\r\n"]).encode()

    def request(self, path: str, body: bytes, kind: str, *headers: str) -> bytes:
        """A whole request."""
        return self.head("POST", path, f"content-type: {kind}", f"content-length: {len(body)}", *headers) + body

    def file(self, name: str) -> bytes:
        """One of the files."""
        return (self.folder / name).read_bytes()

    def form(self, path: str, name: str, count: int, *headers: str) -> bytes:
        """A request with the same image several times."""
        start = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode()
        body = (start + self.file(name) + b"\r\n") * count + f"--{BOUNDARY}--\r\n".encode()
        return self.request(path, body, f"multipart/form-data; boundary={BOUNDARY}", *headers)

    def send(self, connection: socket.socket, data: bytes) -> None:
        """Send until the server has taken it all; a slow server is waited for until the end."""
        rest = memoryview(data)
        while rest and not self.ended.is_set():
            with contextlib.suppress(TimeoutError):
                rest = rest[connection.send(rest[:PIECE]) :]

    def read_answer(self, connection: socket.socket) -> None:
        """Read all of one answer, and count its status."""
        answer = self._receive(connection)
        if not answer:
            return
        self.answers[answer[9:12].decode()] += 1
        top, _, rest = answer.partition(b"\r\n\r\n")
        length = next((line for line in top.split(b"\r\n") if line.lower().startswith(b"content-length:")), b":0")
        left = int(length.partition(b":")[2]) - len(rest)
        while left > 0 and (piece := self._receive(connection)):
            left -= len(piece)

    def _receive(self, connection: socket.socket) -> bytes:
        while not self.ended.is_set():
            with contextlib.suppress(TimeoutError):
                return connection.recv(PIECE)
        return b""


Step = Callable[[], None]


def posting(make: Callable[[Target], bytes]) -> Callable[[Target], Step]:
    """Send the same request again and again, each on a new connection, and read its answer."""

    def prepare(target: Target) -> Step:
        data = make(target)

        def step() -> None:
            with target.connect() as connection:
                target.send(connection, data)
                target.read_answer(connection)

        return step

    return prepare


def holding(make: Callable[[Target], bytes], count: int, receive_buffer: int = 0) -> Callable[[Target], Step]:
    """Open connections, send each the same, and leave them open; those that the server closes are opened again."""

    def prepare(target: Target) -> Step:
        data = make(target)

        def step() -> None:
            with contextlib.ExitStack() as stack:
                for _ in range(count):
                    connection = stack.enter_context(target.connect(receive_buffer))
                    target.send(connection, data)
                target.ended.wait(6)

        return step

    return prepare


def flooding(first: Callable[[Target], bytes], piece: bytes, most: int) -> Callable[[Target], Step]:
    """Send one beginning, then the same piece without end, until the server hangs up or took `most` bytes."""

    def prepare(target: Target) -> Step:
        begin, many = first(target), piece * (PIECE // len(piece))

        def step() -> None:
            with target.connect() as connection:
                target.send(connection, begin)
                for _ in range(most // len(many)):
                    target.send(connection, many)
                target.read_answer(connection)

        return step

    return prepare


def form(path: str, name: str, count: int) -> Callable[[Target], Step]:
    """Post one file several times in one request."""
    return posting(lambda target: target.form(path, name, count))


def json_body(body: bytes, path: str = "/embed") -> Callable[[Target], Step]:
    """Post JSON."""
    return posting(lambda target: target.request(path, body, JSON))


def braces(target: Target) -> Step:
    """Post jobs on patterns that stand for billions of names."""
    requests = [target.request("/jobs", json.dumps({"source": pattern}).encode(), JSON) for pattern in PATTERNS]

    def step() -> None:
        for data in requests:
            with target.connect() as connection:
                target.send(connection, data)
                target.read_answer(connection)

    return step


def chunked(target: Target, path: str = "/embed") -> bytes:
    """The head of a request with a chunked body."""
    return target.head("POST", path, "content-type: image/jpeg", "transfer-encoding: chunked")


def stream(target: Target) -> bytes:
    """The head of a stream that sends no image."""
    return target.head("POST", "/embed/stream", "content-type: application/x-ndjson", "transfer-encoding: chunked")


def first_head(target: Target) -> bytes:
    """A head without its end."""
    return target.head("GET", "/livez")[:-2]


def second_head(target: Target) -> bytes:
    """A whole request, and a second one without the end of its head."""
    return target.head("GET", "/livez") + first_head(target)


def one_byte(target: Target) -> bytes:
    """The first byte of a body of 100 kB."""
    return target.head("POST", "/embed", "content-type: image/jpeg", "content-length: 100000") + b"\xff"


def large_answer(target: Target, count: int = 64) -> bytes:
    """A request whose answer in JSON has more than 15 MB."""
    return target.form("/features?stages=stage1", "photo", count, "accept: application/json")


# By name: threads, and what each of them does.
ATTACKS: dict[str, tuple[int, Callable[[Target], Step]]] = {
    "idle streams": (1, holding(stream, 64)),
    "one-byte bodies": (2, holding(one_byte, 256)),
    "headers, first request": (2, flooding(first_head, b"a: b\r\n", 126_000_000)),
    "headers, second request": (2, flooding(second_head, b"a: b\r\n", 126_000_000)),
    "chunks of one byte": (1, flooding(chunked, b"1\r\nx\r\n", 60_000_000)),
    "chunk extensions": (1, flooding(lambda target: chunked(target) + b"1;", b"x" * 1000, 60_000_000)),
    "trailers": (1, flooding(lambda target: chunked(target) + b"1\r\nx\r\n0\r\n", b"a: b\r\n", 60_000_000)),
    "slow readers": (1, holding(large_answer, 16, receive_buffer=4096)),
    "64 WebPs of 8000 x 8000": (2, form("/embed", "large.webp", 64)),
    "1 WebP of 8000 x 8000": (8, form("/embed", "large.webp", 1)),
    "64 WebPs of 1000 x 1000": (4, form("/embed", "medium.webp", 64)),
    "JPEGs of 480 scans": (4, form("/embed", "scans.jpg", 4)),
    "JPEGs of 60 scans": (4, form("/embed", "allowed_scans.jpg", 4)),
    "JPEGs of empty segments": (2, form("/embed", "segments.jpg", 1)),
    "JPEGs of Exif segments": (2, form("/embed", "exif.jpg", 1)),
    "PNGs of 1.6 million chunks": (2, form("/embed", "chunks.png", 1)),
    "PNGs of 64 megapixels": (4, form("/embed", "pixels.png", 1)),
    "JSON of 11 million objects": (2, json_body(b'{"input":[' + b"{}," * 11_000_000 + b"{}]}")),
    "JSON 16 million deep": (2, json_body(b'{"input":' + b"[" * 33_000_000, "/v1/embeddings")),
    "braces": (7, braces),
    "connections": (2, holding(lambda target: b"", 600)),
}


def main() -> None:
    """Attack until the time is up or standard input closes; then print the statuses of the answers."""
    folder, port, source, key, seconds, *names = sys.argv[1:]
    target = Target(Path(folder), int(port), source, key)
    threads = []
    for name in names:
        count, prepare = ATTACKS[name]
        step = prepare(target)
        threads += [threading.Thread(target=repeat, args=(target, step), daemon=True) for _ in range(count)]
    print("ready", flush=True)
    sys.stdin.readline()  # begin
    os.nice(NICENESS)
    for thread in threads:
        thread.start()
    timer = threading.Timer(float(seconds), target.ended.set)
    timer.daemon = True
    timer.start()
    threading.Thread(target=lambda: (sys.stdin.readline(), target.ended.set()), daemon=True).start()
    target.ended.wait()
    print(json.dumps(target.answers), flush=True)
    os._exit(0)  # and with it all connections


def repeat(target: Target, step: Step) -> None:
    """Repeat a step until the end."""
    while not target.ended.is_set():
        try:
            step()
        except OSError as error:
            target.answers[type(error).__name__] += 1
        target.ended.wait(PAUSE)


if __name__ == "__main__":
    main()
