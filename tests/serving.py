"""What the tests of the HTTP routes share: a client of the app, and an engine that a test can hold up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from conftest import REPOSITORY
from numpy.typing import NDArray

from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import Engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.certificate import certify
from mixmim_serve.service.app import create_app
from mixmim_serve.service.runtime import Runtime
from mixmim_serve.service.server import server_config
from mixmim_serve.service.settings import Settings

with warnings.catch_warnings():  # Starlette would rather have httpx2, which BentoML does not use yet
    warnings.simplefilter("ignore")
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

PHOTOS = {path.stem: path for path in sorted((REPOSITORY / "examples").glob("*.jpg"))}
HAT, SHOES = PHOTOS["hat"].read_bytes(), PHOTOS["shoes"].read_bytes()
BAD = REPOSITORY / "tests" / "data" / "robustness" / "bad"
NPY, NPZ, JPEG = {"accept": "application/x-npy"}, {"accept": "application/x-npz"}, {"content-type": "image/jpeg"}
CLASS_NAMES = ["cat", "dog", "owl"]
MODEL = "small"  # the name of `exported_bundle`, that of its folder
IDENTITY = {"model", "fingerprint", "model_fingerprint"}  # keys of every answer
PATIENCE = 20  # seconds until a test that would hang fails


class Gate:
    """A call that waits until the test sets `release`."""

    def __init__(self) -> None:
        self.reached, self.release = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.release.wait(PATIENCE)


@dataclasses.dataclass
class Around:
    """An engine with something done before each run."""

    engine: Engine
    before: Callable[[], object]

    def __post_init__(self) -> None:
        self.bundle, self.name, self.precision = self.engine.bundle, self.engine.name, self.engine.precision
        self.version, self.hardware = self.engine.version, self.engine.hardware
        self.max_batch = self.engine.max_batch
        self.ran: list[tuple[str, list[str]]] = []

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.ran.append((graph, list(outputs)))
        self.before()
        return self.engine.run(graph, inputs, outputs)


def app_of(engine: Engine, **settings: Any) -> Starlette:
    """The app with this engine."""
    certify(getattr(engine, "engine", engine))  # kept from here on, so that what stands around an engine sees no test
    app = create_app(Settings(**settings))
    app.state.runtime = Runtime(engine, app.state.settings, app.state.metrics)
    return app


@contextlib.contextmanager
def client_of(engine: Engine, **settings: Any) -> Iterator[TestClient]:
    """A client of the app with this engine; nothing may be left inside."""
    app = app_of(engine, **settings)
    runtime, admission = app.state.runtime, app.state.admission
    with TestClient(app) as client:
        yield client
    assert (admission.images, admission.bytes) == (0, 0)
    runtime.close()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def url_of(engine: Engine, *, send_buffer: int = 0, **settings: Any) -> Iterator[tuple[str, Starlette]]:
    """The app behind a real socket, in a thread of this process; nothing may be left inside.

    `send_buffer` is what the kernel keeps of an answer, in bytes; 0 leaves it to the kernel.
    """
    app = app_of(engine, **settings)
    config = server_config(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
    runtime, admission = app.state.runtime, app.state.admission
    assert (admission.images, admission.bytes) == (0, 0)
    runtime.close()


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """A multipart form; the names are none of the server's business."""
    return [("image", ("../../etc/passwd", image)) for image in images]


def refusal(response: Any) -> tuple[int, str, str | None]:
    """Status, message and param, after a look at the shape that all errors share."""
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return response.status_code, body["error"]["message"], body["error"]["param"]


def take_out(folder: Path, part: str) -> Path:
    """Make a bundle say that it has no head, or no decoder."""
    values = json.loads((folder / "config.json").read_text())
    if part == "head":
        values["architecture"]["num_classes"], values["labels"] = 0, []
        values["graphs"]["encoder"].remove("logits")
    else:
        values["architecture"]["decoder"] = None
        del values["graphs"]["reconstruct"]
    (folder / "config.json").write_text(json.dumps(values))
    bundle = open_bundle(folder)
    dataclasses.replace(bundle, fingerprint=bundle._actual_fingerprint()).save_config()
    return folder
