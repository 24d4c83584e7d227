"""How long a stream may be: as both sides like, while both go on."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from pathlib import Path

from serving import HAT, PATIENCE, Around, client_of
from test_server import serve

from mixmim_serve.engines import Engine

LINE = json.dumps({"input": base64.b64encode(HAT).decode()}).encode() + b"\n"
NDJSON = {"content-type": "application/x-ndjson"}


def test_a_stream_may_take_longer_than_a_request(engine: Engine) -> None:
    with client_of(Around(engine, lambda: time.sleep(0.2)), request_seconds=0.1, max_batch=1) as client:
        response = client.post("/embed/stream", content=LINE * 3, headers=NDJSON)
        assert [json.loads(line)["status"] for line in response.text.splitlines()] == ["ok"] * 3
        assert client.post("/embed", content=HAT, headers={"content-type": "image/jpeg"}).status_code == 504


def test_a_stream_may_announce_more_bytes_than_a_request(engine: Engine) -> None:
    with client_of(engine, max_body_bytes=len(LINE) + 10) as client:
        response = client.post("/embed/stream", content=LINE * 2, headers=NDJSON)  # with a content-length
        assert [json.loads(line)["status"] for line in response.text.splitlines()] == ["ok"] * 2


def test_a_client_that_does_not_read_its_stream_is_hung_up_on(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, "body_seconds=1", "stream_window=2") as server:
        server.wait_until_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=2) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = "POST /embed/stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
            deaf.sendall(f"{head}content-length: {10**9}\r\n\r\n".encode())
            with contextlib.suppress(OSError):
                while True:
                    deaf.sendall(b"no JSON\n" * 1000)  # until nobody takes them any more
            deadline = time.monotonic() + PATIENCE
            while (ended := b'mixmim_failures_total{reason="broken_off"}') not in server.ask("GET", "/metrics")[1]:
                assert time.monotonic() < deadline, ended
                time.sleep(0.05)
            assert b"mixmim_images_inside 0.0" in server.ask("GET", "/metrics")[1]
