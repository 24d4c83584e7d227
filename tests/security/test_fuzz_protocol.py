"""Streams of requests that hypothesis damages and cuts: answered the same however they arrive, and nothing is left.

Over a transport in memory; `make fuzz` goes on for minutes.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson
import uvicorn
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from test_fuzz import fuzzed, mutated
from uvicorn.server import ServerState

from mixmim_serve.service.bounded_json import has_more_parts
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.protocol import LimitedProtocol, protocol_class
from mixmim_serve.service.settings import Settings

CHUNKED = b" HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
SEEDS = [
    b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /b HTTP/1.1\r\ncontent-length: 7\r\n\r\nab\r\n\r\nc",
    b"POST /c" + CHUNKED + b"3\r\nabc\r\n4;x=y\r\n\r\n\r\n\r\n0\r\nt: u\r\n\r\n",
    b"POST /early HTTP/1.1\r\ncontent-length: 5\r\n\r\nabcde",
    b"POST /early" + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
    b"\r\n\r\n",
    b"GET /d HTTP/1.1\r\nconnection: close\r\n\r\n",
    b"GET /e HTTP/1.0\r\n\r\n",
    b"GET /f HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"GET /" + b"x" * 250 + b" HTTP/1.1\r\n\r\n",
    b"GET /g HTTP/1.1\r\n" + b"a: b\r\n" * 12 + b"\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n\r\n",
    b"POST /h HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nab",
]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REFUSAL = re.compile(rb"HTTP/1.1 4\d\d .*<END>", re.DOTALL)  # of two errors, the first to be seen counts


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body; /early does not wait for it."""
    length = 0
    while scope["path"] != "/early":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        if not message["more_body"]:
            break
    body = f"{scope['path']} {length}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.written += b"<END>"

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def ignore(self, *_: Any, **__: Any) -> None:
        """Flow control."""

    set_write_buffer_limits = pause_reading = resume_reading = ignore
    abort = close


LIMITS = Settings(max_header_bytes=2000, max_headers=10, max_request_line=200)
PROTOCOL = protocol_class(LIMITS, Metrics())
CONFIG = uvicorn.Config(app, PROTOCOL, lifespan="off", log_config=None, ws="none", server_header=False)
CONFIG.load()


async def conversation(pieces: list[bytes]) -> bytes:
    """What the server writes to a client that sends these pieces and then leaves."""
    transport = Transport()
    protocol: LimitedProtocol = PROTOCOL(CONFIG, ServerState(), {}, asyncio.get_running_loop())
    protocol.logger.disabled = True
    protocol.connection_made(transport)
    for number, piece in enumerate(filter(None, pieces)):
        if transport.closed:
            break
        protocol.data_received(piece)
        await turns(number * 7 % 9)
    await turns(60)
    is_busy = protocol.cycle is not None and not protocol.cycle.response_complete
    assert transport.closed or is_busy or protocol._timer or protocol.timeout_keep_alive_task  # nobody waits for ever
    assert not protocol.pipeline
    protocol.connection_lost(None)
    await turns(10)
    connections = protocol.open_connections
    assert (connections.total, connections.lingering, len(connections.by_client), len(protocol.tasks)) == (0, 0, 0, 0)
    return REFUSAL.sub(b"refused", transport.written.replace(CONTINUE, b""))


async def turns(count: int) -> None:
    """So many turns of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


@fuzzed(300)
@given(
    st.lists(st.sampled_from(SEEDS) | mutated(SEEDS), min_size=1, max_size=6).map(b"".join),
    st.lists(st.integers(0, 2000), max_size=40),
)
def test_requests_are_answered_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    async def check() -> None:
        whole = await conversation([data])
        cut = await conversation(in_pieces(data, cuts))
        if b"/early" not in data:  # whose answer may come before the error in its body
            assert whole == cut

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=30,
)


@fuzzed(300)
@given(JSON)
def test_json_has_no_more_values_than_its_bound(value: object) -> None:
    def count(value: object) -> int:
        if isinstance(value, dict):
            return 1 + sum(1 + count(item) for item in value.values())
        return 1 + sum(map(count, value)) if isinstance(value, list) else 1

    assert count(value) == 1 or has_more_parts(orjson.dumps(value), (count(value) - 2) // 2)
