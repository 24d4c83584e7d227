"""Attacks on HTTP itself, over raw sockets: heads, framing, pipelines, connections, clients that do not read."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving import HAT, PATIENCE, files, url_of
from test_server import Server, serve

from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError
from mixmim_serve.service.connections import Connections
from mixmim_serve.service.settings import Settings

GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /embed HTTP/1.1\r\ncontent-type: image/jpeg\r\ntransfer-encoding: chunked\r\n\r\n"
LIMITS = {"header_seconds": 1.0, "body_seconds": 1.0, "send_seconds": 1.0}


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


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    """A server with short times."""
    with url_of(engine, **LIMITS) as (url, _):
        yield int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def server(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as a process, whose memory can be seen."""
    with serve(exported_bundle, tmp_path_factory.mktemp("server")) as running:
        running.wait_until_ready()
        yield running


def grown(server: Server, attack: Callable[[], object]) -> float:
    """Bytes by which the peak memory of a server grows under an attack."""
    status = Path(f"/proc/{server.process.pid}/status")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process(server.process.pid).memory_info().rss
    attack()
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


# Heads

LARGE_HEADS = {
    "too many headers": (head(b"a: b\r\n" * 100), 431, "too_many_headers"),
    "too many bytes": (head(b"a: " + b"b" * 66_000 + b"\r\n"), 431, "headers_too_large"),
    "without end": (head(b"a: " + b"b" * 90_000)[:-2], 431, "headers_too_large"),
    "a long name": (head(b"a" * 66_000 + b": b\r\n"), 431, "headers_too_large"),
    "blanks": (head(b"a: " + b" " * 66_000 + b"b\r\n"), 431, "headers_too_large"),
    "line ends": (b"\r\n" * 40_000 + GET, 431, "headers_too_large"),
    "request line": (head(path=b"/" + b"x" * 8192), 414, "request_line_too_long"),
    "request line without end": (b"GET /" + b"x" * 9000, 414, "request_line_too_long"),
    "request line after line ends": (b"\r\n\r\n\r\n" + head(path=b"/" + b"x" * 8192), 414, "request_line_too_long"),
}


@pytest.mark.parametrize("first", [b"", GET], ids=["first", "second"])
@pytest.mark.parametrize("case", LARGE_HEADS)
def test_large_heads_are_refused(port: int, first: bytes, case: str) -> None:
    data, status, code = LARGE_HEADS[case]
    with Peer(port) as peer:
        if first:
            peer.send(first)
            assert peer.response()[0] == 200
        peer.send(data)
        assert peer.refusal() == (status, code)


def test_heads_within_the_limits_are_answered(port: int) -> None:
    with Peer(port) as peer:
        for data in (
            head(b"a: b\r\n" * 99),
            head(b"a: " + b"b" * 65_000 + b"\r\n"),
            head(path=b"/livez?" + b"x" * 8000),
            b"\r\n" + GET,
        ):
            peer.send(data)
            assert peer.response()[0] == 200


@pytest.mark.parametrize("first", [b"", GET], ids=["first", "second"])
def test_endless_headers_cost_no_memory(server: Server, first: bytes) -> None:
    def attack() -> None:
        with Peer(server.port) as peer:
            if first:
                peer.send(first)
                assert peer.response()[0] == 200
            peer.send(GET[:-2])
            peer.flood(b"a: b\r\n" * 20_000, most=126_000_000)

    assert grown(server, attack) < 8e6


@pytest.mark.parametrize("first", [b"", GET, photo(b"transfer-encoding: ", b"chunked", chunks(HAT, 9999))])
def test_slow_heads_are_answered_408(port: int, first: bytes) -> None:
    with Peer(port) as peer:
        if first:
            peer.send(first)
            assert peer.response()[0] == 200
        began = time.monotonic()
        peer.send(GET[:-4])
        while time.monotonic() - began < 0.8:
            peer.send(b"x")
            time.sleep(0.1)
        assert peer.refusal() == (408, "headers_too_slow")
        assert time.monotonic() - began < 5


def test_a_connection_that_sends_nothing_is_closed_silently(port: int) -> None:
    with Peer(port) as peer:
        assert peer.is_closed()


def test_a_body_that_nobody_reads_must_end(port: int) -> None:
    with Peer(port) as peer:
        peer.send(b"POST /nowhere HTTP/1.1\r\ncontent-length: 99\r\n\r\nx")
        assert peer.response()[0] == 404
        began = time.monotonic()
        peer.send(b"x")
        assert peer.is_closed()
        assert time.monotonic() - began < 5
    with Peer(port) as peer:
        peer.send(b"POST /nowhere HTTP/1.1\r\ncontent-length: 3\r\n\r\nx")
        assert peer.response()[0] == 404
        peer.send(b"xx" + GET)
        assert peer.response()[0] == 200


# Framing

FRAMING = {
    "chunks of one byte": CHUNKED + b"1\r\nx\r\n" * 50_000,
    "a chunk extension": CHUNKED + b"1;" + b"x" * 200_000,
    "many chunk extensions": CHUNKED + chunks(bytes(2000), 1, b";" + b"x" * 60),
    "chunk sizes with zeros": CHUNKED + chunks(bytes(2000), 1, b"")[:-5] + b"0" * 200_000,
    "trailers": CHUNKED + b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * 20_000,
    "a trailer": CHUNKED + b"1\r\nx\r\n0\r\na: " + b"b" * 100_000,
}


@pytest.mark.parametrize("case", FRAMING)
def test_framing_beyond_the_limit_is_refused(port: int, case: str) -> None:
    with Peer(port) as peer:
        peer.send(FRAMING[case])
        assert peer.refusal() == (400, "too_much_framing")


def test_much_body_buys_no_large_trailer(port: int) -> None:
    with Peer(port) as peer:
        peer.send(CHUNKED + b"400000\r\n" + bytes(0x400000) + b"\r\n0\r\na: " + b"b" * 200_000)
        assert peer.refusal() == (400, "too_much_framing")


@pytest.mark.parametrize("size", [100, 4096, 10**6])
def test_chunks_of_usual_sizes_are_read(port: int, size: int) -> None:
    with Peer(port) as peer:
        peer.send(CHUNKED + chunks(HAT * (1 if size < 10**6 else 200), size))
        assert peer.response()[0] == 200
        peer.send(GET)
        assert peer.response()[0] == 200


def test_tiny_chunks_cost_no_memory(server: Server) -> None:
    def attack() -> None:
        with Peer(server.port) as peer:
            peer.send(CHUNKED)
            peer.flood(b"1\r\nx\r\n" * 10_000, most=60_000_000)

    assert grown(server, attack) < 8e6


def test_trailers_do_not_become_headers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMIM_API_KEYS", "k" * 20)
    with url_of(engine) as (url, _), Peer(int(url.rpartition(":")[2])) as peer:
        peer.send(CHUNKED + chunks(HAT, 4096, trailers=b"x-api-key: " + b"k" * 20 + b"\r\n"))
        assert peer.response()[0] == 401
        keyed = CHUNKED[:-2] + b"x-api-key: " + b"k" * 20 + b"\r\n\r\n"
        peer.send(keyed + chunks(HAT, 4096, trailers=b"x-request-id: smuggled\r\n"))
        status, headers, _ = peer.response()
        assert (status, headers["x-request-id"] == "smuggled") == (200, False)


def test_an_upgrade_that_is_not_offered_ends_the_connection(port: int) -> None:
    with Peer(port) as peer:  # what follows is not read as a request, whatever a proxy in front takes it for
        peer.send(head(b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 99\r\n") + GET)
        status, headers, _ = peer.response()
        assert (status, headers["connection"]) == (200, "close")
        assert peer.is_closed()


# Pipelines

BROKEN = {
    "no HTTP": b"BROKEN\r\n\r\n",
    "two lengths": b"POST /embed HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "length and chunks": b"POST /embed HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n",
    "a chunk size": CHUNKED + b"zz\r\n",
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("before", [0, 3])
def test_a_bad_pipelined_request_drops_no_answer_before_it(port: int, case: str, before: int) -> None:
    with Peer(port) as peer:
        peer.send(photo() * before + BROKEN[case] + GET)
        for _ in range(before):
            assert peer.response()[0] == 200
        assert peer.refusal() == (400, "malformed_request")


def test_requests_are_answered_however_they_are_cut(port: int) -> None:
    bad = photo(body=b"\r\n\r\nno image\r\n\r\n0\r\n\r\n")
    chunked = CHUNKED + chunks(b"\r\n\r\nno image\r\n\r\n", 7, b";a=b", b"t: u\r\n")
    data, expected = GET + bad + chunked + GET + chunked + bad + GET, [200, 415, 415, 200, 415, 415, 200]
    for cut in range(1, len(data), 3):
        with Peer(port) as peer:
            peer.send(data[:cut])
            time.sleep(0.001)
            peer.send(data[cut:])
            assert [peer.response()[0] for _ in expected] == expected, cut
    with Peer(port) as peer:
        for byte in data:
            peer.send(bytes([byte]))
        assert [peer.response()[0] for _ in expected] == expected


def test_a_long_pipeline_costs_little_memory(server: Server) -> None:
    def attack() -> None:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(Peer(server.port)) for _ in range(30)]
            for peer in peers:
                peer.send(GET * 7000)
            for peer in peers:
                assert peer.response()[0] == 200

    assert grown(server, attack) < 40e6  # 0.7 MB each: what was read at once, and what waits


# Connections


@pytest.mark.parametrize(
    ("limit", "expected"), [("max_connections", 503), ("max_connections_per_client", 429)], ids=["all", "client"]
)
def test_connections_are_limited(engine: Engine, limit: str, expected: int) -> None:
    with url_of(engine, **{limit: 3}) as (url, app), contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        first, *_ = peers = [stack.enter_context(Peer(port)) for _ in range(3)]
        for peer in peers:
            peer.send(GET)
            assert peer.response()[0] == 200
        for _ in range(5):
            with Peer(port) as refused:
                refused.send(photo())
                assert refused.refusal() == (expected, "too_many_connections")
        metrics = app.state.metrics.exposition().decode()
        assert "mixmim_connections 3.0" in metrics
        assert "mixmim_connections_refused_total 5.0" in metrics
        first.socket.close()
        wait_until(lambda: "mixmim_connections 2.0" in app.state.metrics.exposition().decode())
        with Peer(port) as peer:
            peer.send(GET)
            assert peer.response()[0] == 200


def test_what_counts_as_one_client() -> None:
    proxies = ("10.0.0.0/8", "2001:db8:1::/48")
    connections = Connections(Settings(max_connections=9, max_connections_per_client=1, trusted_proxies=proxies))

    def enter(*addresses: str | None) -> list[int]:
        places = [connections.enter(address) for address in addresses]
        statuses = [place.error.status if place.error else 200 for place in places]
        for place in places:
            connections.leave(place)
        assert (connections.total, connections.lingering, len(connections.by_client)) == (0, 0, 0)
        return statuses

    assert enter("192.0.2.1", "192.0.2.1", "192.0.2.2", "::ffff:192.0.2.1") == [200, 429, 200, 429]
    assert enter("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1") == [200, 429, 200]
    assert enter("10.1.1.1", "10.1.1.1", "2001:db8:1::1", "2001:db8:1::1", None, None) == [200] * 6
    assert enter(*["10.1.1.1"] * 10) == [200] * 9 + [503]


def test_a_proxy_that_is_no_address_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"trusted_proxies must be addresses or networks such as 10\.0\.0\.0/8, got 'x'"
    ):
        Settings(trusted_proxies=("x",))


# Slow readers

FEATURES = "/features?stages=stage1,stage2,stage3,stage4"


def many_photos(images: int = 64) -> bytes:
    """A request whose answer is 2 MB of JSON."""
    form = httpx.Request("POST", f"http://x{FEATURES}", files=files(*[HAT] * images))
    lines = [f"{name}: {value}\r\n" for name, value in form.headers.items() if name.startswith("content")]
    request = f"POST {FEATURES} HTTP/1.1\r\naccept: application/json\r\n{''.join(lines)}\r\n"
    return request.encode() + form.read()


def test_a_client_that_does_not_read_is_disconnected(engine: Engine) -> None:
    with url_of(engine, send_buffer=65_536, send_seconds=1.0) as (url, app):
        admission = app.state.admission
        with Peer(int(url.rpartition(":")[2]), receive_buffer=65_536) as peer:
            peer.send(many_photos())
            peer.received = peer.socket.recv(1000)  # the answer has begun
            began = time.monotonic()
            while time.monotonic() - began < 0.7:
                assert admission.bytes > 0  # an answer that is not read counts
                assert admission.images == 64
                time.sleep(0.05)
            wait_until(lambda: (admission.bytes, admission.images) == (0, 0))
            assert time.monotonic() - began < 5
            metrics = app.state.metrics.exposition().decode()
            assert 'mixmim_failures_total{reason="not_read"} 1.0' in metrics
            assert peer.is_reset()


def test_a_client_that_reads_slowly_gets_everything(engine: Engine) -> None:
    settings = {"send_seconds": 1.0, "request_seconds": 1.0}
    with url_of(engine, send_buffer=65_536, **settings) as (url, app):
        with Peer(int(url.rpartition(":")[2]), receive_buffer=65_536) as peer:
            peer.send(many_photos(40))
            began = time.monotonic()
            while len(peer.received) < 1_000_000:
                peer.received += peer.socket.recv(65536)
                time.sleep(0.1)
            assert time.monotonic() - began > 1.5  # longer than the deadline, which ends when the answer begins
            assert app.state.admission.bytes > 0
            status, _, body = peer.response()
        assert status == 200
        assert len(json.loads(body)["data"]) == 40
        wait_until(lambda: app.state.admission.bytes == 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
