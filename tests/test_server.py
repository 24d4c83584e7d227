"""The server as it really runs: `mixmim serve` as a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # comes with BentoML
import pytest
from conftest import REPOSITORY
from serving import free_port

from mixmim_serve.bundle import open_bundle
from mixmim_serve.service.server import EVERYWHERE, address

HAT = REPOSITORY / "examples" / "hat.jpg"
MIXMIM = [sys.executable, "-c", "from mixmim_serve.cli import main; main()"]
START = 30  # seconds to be ready, or to give up
STOP = 15  # seconds to end after SIGTERM


@dataclass(frozen=True)
class Server:
    """A running `mixmim serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "image/jpeg"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()

    def wait_until_ready(self) -> None:
        """Poll as an orchestrator would."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/readyz")[0] == 200:
                    return
            time.sleep(0.05)
        pytest.fail(f"not ready:\n{self.log.read_text()}")

    def wait(self, seconds: int) -> int:
        """The exit code, once the server has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end:\n{self.log.read_text()}")


@contextlib.contextmanager
def serve(
    bundle: Path | str, folder: Path, *settings: str, port: int = 0, jobs_root: Path | None = None
) -> Iterator[Server]:
    """Start a server, at a free port unless told which; whatever happens, it is gone afterwards."""
    port = port or free_port()
    options = [word for each in settings for word in ("--set", each)]
    options += ["--jobs-root", str(jobs_root)] if jobs_root else []
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*MIXMIM, "serve", str(bundle), "--port", str(port), "--engine", "onnx", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    server = Server(process, port, folder / "log")
    try:
        yield server
    finally:
        process.kill()
        process.wait()


def test_serve_starts_answers_and_ends(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        status, body = server.ask("POST", "/embed", HAT.read_bytes())
        assert (status, body[:14]) == (200, b'{"embedding":[')
        assert b'mixmim_requests_total{route="/embed",status="200"} 1.0' in server.ask("GET", "/metrics")[1]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(STOP) == 0
        log = server.log.read_text()
        assert f"serving small from {exported_bundle} at http://127.0.0.1:{server.port}\n" in log
        assert f"model fingerprint {open_bundle(exported_bundle).fingerprint}, engine fingerprint " in log
        assert f"open http://127.0.0.1:{server.port}/docs in a browser" in log
        assert "POST '/embed' 200" in log
        assert "Traceback" not in log


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:3000"),
        ("localhost", "http://localhost:3000"),
        ("::1", "http://[::1]:3000"),
        ("0.0.0.0", "http://127.0.0.1:3000"),  # noqa: S104 - nothing is bound
        ("::", "http://[::1]:3000"),
    ],
)
def test_the_address_of_the_page_can_be_opened(host: str, url: str) -> None:
    assert address(EVERYWHERE.get(host, host), 3000) == url


def test_what_is_in_flight_is_finished_after_sigterm(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=STOP) as connection:
            photo = HAT.read_bytes()
            head = post(len(photo))
            connection.sendall(head + photo[:-100])
            assert server.ask("GET", "/livez")[0] == 200  # so that the first half has been read
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP
            while time.monotonic() < deadline:  # nobody is let in any more
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
                    time.sleep(0.05)
                    continue
                break
            connection.sendall(photo[-100:])
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert server.wait(STOP) == 0


def test_a_request_that_does_not_end_is_given_up_after_the_grace(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, "grace_seconds=1") as server:
        server.wait_until_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=STOP) as connection:
            connection.sendall(post(9))
            assert server.ask("GET", "/livez")[0] == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.wait(STOP) == 0


def test_a_slow_body_and_slow_headers_are_answered_408(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, "body_seconds=1", "header_seconds=1") as server:
        server.wait_until_ready()
        address = ("127.0.0.1", server.port)
        with (
            socket.create_connection(address, timeout=STOP) as body,
            socket.create_connection(address, timeout=STOP) as head,
        ):
            body.sendall(post(99))
            head.sendall(b"POST /embed HTTP/1.1\r\n")
            began = time.monotonic()
            while time.monotonic() - began < 0.8:
                body.sendall(b"x")
                head.sendall(b"x-y: z\r\n")
                assert server.ask("POST", "/embed", HAT.read_bytes())[0] == 200  # others are not kept waiting
                time.sleep(0.2)
            answer = read_to_end(body)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the body was not complete within 1 s" in answer
            answer = read_to_end(head)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the headers were not complete within 1 s" in answer
        assert b'mixmim_failures_total{reason="body_too_slow"} 1.0' in server.ask("GET", "/metrics")[1]


def test_a_body_that_lies_about_its_length_harms_nobody(exported_bundle: Path, tmp_path: Path) -> None:
    photo = HAT.read_bytes()
    with serve(exported_bundle, tmp_path, "body_seconds=1") as server:
        server.wait_until_ready()
        for length, expected in ((len(photo) + 50, b"HTTP/1.1 408 "), (len(photo) - 50, b"HTTP/1.1 4")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=STOP) as connection:
                head = post(length)
                connection.sendall(head + photo)
                assert connection.recv(65536).startswith(expected)
        assert server.ask("POST", "/embed", photo)[0] == 200


def test_a_thousand_connections_at_once(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path, "max_connections_per_client=1024") as server, contextlib.ExitStack() as stack:
        server.wait_until_ready()
        before = psutil.Process(server.process.pid).memory_info().rss
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, open_files[1]), open_files[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, open_files)
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), STOP)) for _ in range(1000)]
        assert server.ask("POST", "/embed", HAT.read_bytes())[0] == 200
        for connection in idle:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert all(connection.recv(4096).startswith(b"HTTP/1.1 200 OK") for connection in idle)
        assert psutil.Process(server.process.pid).memory_info().rss - before < 100e6


def post(length: int) -> bytes:
    """Headers that announce an image of so many bytes."""
    return f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: {length}\r\n\r\n".encode()


def read_to_end(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def test_serve_ends_by_itself_when_the_engine_cannot_load(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"no graph")
    config = json.loads((bundle_copy / "config.json").read_text())
    config["sha256"]["encoder.onnx"] = hashlib.sha256(b"no graph").hexdigest()  # so that only the runtime objects
    (bundle_copy / "config.json").write_text(json.dumps(config))
    with serve(bundle_copy, tmp_path) as server:
        assert server.wait(START) == 1
        assert "mixmim: ONNX Runtime" in server.log.read_text()


@pytest.mark.parametrize("case", ["port in use", "not our address", "unknown engine", "no bundle", "altered bundle"])
def test_serve_refuses_in_one_sentence(exported_bundle: Path, bundle_copy: Path, tmp_path: Path, case: str) -> None:
    weights = bundle_copy / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        arguments, sentence = {
            "port in use": ([exported_bundle, "--port", taken], f"port {taken} is in use: choose another with --port."),
            "not our address": ([exported_bundle, "--host", "192.0.2.1"], "cannot bind 192.0.2.1:3000: "),
            "unknown engine": (
                [exported_bundle, "--engine", "abacus"],
                "unknown engine 'abacus': choose one of auto, onnx",
            ),
            "altered bundle": ([bundle_copy], f"{weights} was altered after the export"),
            "no bundle": ([tmp_path / "missing"], f"{tmp_path / 'missing'} is not a bundle: "),
        }[case]
        done = subprocess.run([*MIXMIM, "serve", *arguments], capture_output=True, text=True, timeout=START)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mixmim: {sentence}")
    assert done.stderr.count("\n") == 1
