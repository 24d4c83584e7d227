"""Attacks on HTTP itself, over raw sockets: heads, framing, pipelines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from raw_http import CHUNKED, GET, Peer, chunks, head, photo
from serving import HAT, url_of
from test_server import Server, serve

from mixmim_serve.engines import Engine

LIMITS = {"header_seconds": 1.0, "body_seconds": 1.0, "send_seconds": 1.0}


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
