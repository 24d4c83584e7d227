"""Too many connections, and clients that do not read their answers."""

from __future__ import annotations

import contextlib
import json
import time

import httpx
import pytest
from raw_http import GET, Peer, photo, wait_until
from serving import HAT, files, url_of

from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError
from mixmim_serve.service.connections import Connections
from mixmim_serve.service.settings import Settings


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
