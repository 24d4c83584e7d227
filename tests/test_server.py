"""The server as it really runs: BentoML around our routes, and `mixmim serve` as a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # comes with BentoML
import pytest
from conftest import REPOSITORY

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
    workers: set[psutil.Process] = field(default_factory=set)  # seen so far; each is a session of its own

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
            self.look()
        pytest.fail(f"not ready:\n{self.log.read_text()}")

    def wait(self, seconds: int) -> int:
        """The exit code, once the server and every worker have ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            self.look()
        assert not psutil.wait_procs(self.workers, timeout=STOP)[1]
        return self.process.returncode

    def look(self) -> None:
        """Pause, and remember the workers that run."""
        time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            self.workers.update(psutil.Process(self.process.pid).children(recursive=True))

    def kill(self) -> None:
        """The server first, which would start new workers."""
        self.look()
        for process in (self.process, *self.workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(bundle: Path | str, folder: Path) -> Iterator[Server]:
    """Start a server; whatever happens, all of it is gone afterwards."""
    port = free_port()
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*MIXMIM, "serve", str(bundle), "--port", str(port), "--engine", "onnx"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    server = Server(process, port, folder / "log")
    try:
        yield server
    finally:
        server.kill()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


IN_BENTOML = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from starlette.testclient import TestClient
from mixmim_serve.service.bento import MixMIMService, app

photo = Path(sys.argv[1]).read_bytes()
with TestClient(MixMIMService.to_asgi()) as client:
    assert client.get("/readyz").status_code == 200
    assert client.get("/livez").status_code == 200
    answer = client.post("/embed", files={"image": ("hat.jpg", photo)})
    assert (answer.status_code, len(answer.json()["embedding"])) == (200, 64), answer.text
    answer = client.post("/embed", files={"image": (None, "http://127.0.0.1:1/hat.jpg")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image[0]"), answer.text
    answer = client.post("/embed", files={"image": ("cut.jpg", photo[:900])})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "image[0]"), answer.text
assert app.state.runtime is None  # closed
assert "torch" not in sys.modules
"""


def test_bentoml_serves_our_routes_without_torch(exported_bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_BENTOML, str(HAT)],
        env=os.environ | {"MIXMIM_BUNDLE": str(exported_bundle), "BENTOML_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert done.returncode == 0, done.stderr


def test_serve_starts_answers_and_ends(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        status, body = server.ask("POST", "/embed", HAT.read_bytes())
        assert (status, body[:14]) == (200, b'{"embedding":[')
        assert b'_request_total{endpoint="/embed"' in server.ask("GET", "/metrics")[1]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(STOP) == 0
        assert server.workers
        assert f"at http://127.0.0.1:{server.port}" in server.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_worker_outlives_a_killed_server(exported_bundle: Path, tmp_path: Path) -> None:
    with serve(exported_bundle, tmp_path) as server:
        server.wait_until_ready()
        server.look()
        server.process.kill()
        server.wait(STOP)  # for the workers, too
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", server.port))


def test_serve_ends_by_itself_when_the_engine_cannot_load(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "encoder.onnx").write_bytes(b"no graph")
    config = json.loads((bundle_copy / "config.json").read_text())
    config["sha256"]["encoder.onnx"] = hashlib.sha256(b"no graph").hexdigest()  # so that only the runtime objects
    (bundle_copy / "config.json").write_text(json.dumps(config))
    with serve(bundle_copy, tmp_path) as server:
        server.wait(START)  # rather than start its worker again and again
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
            "no bundle": ([tmp_path / "missing"], f"{tmp_path / 'missing'} is no bundle: "),
        }[case]
        done = subprocess.run([*MIXMIM, "serve", *arguments], capture_output=True, text=True, timeout=START)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mixmim: {sentence}")
    assert done.stderr.count("\n") == 1
