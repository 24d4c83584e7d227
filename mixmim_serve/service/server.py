"""The process of `mixmim serve`: uvicorn with our app, and nothing between them.

BentoML's own server added a third of a millisecond to each request (docs/decisions.md); bentos still run in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import logging.config
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from mixmim_serve.bundle import Bundle, open_bundle
from mixmim_serve.engines.opening import check_kind
from mixmim_serve.errors import ConfigError
from mixmim_serve.service import auth
from mixmim_serve.service.app import create_app
from mixmim_serve.service.jobs.runner import JobRunner
from mixmim_serve.service.metrics import log_config
from mixmim_serve.service.protocol import protocol_class
from mixmim_serve.service.runtime import open_runtime
from mixmim_serve.service.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Addresses that mean all interfaces, and one that a browser on this machine opens.
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
M_MMAP_THRESHOLD = -3  # of malloc.h
SWITCH_SECONDS = 0.001  # that a thread may keep Python's lock while the event loop waits for it; 0.005 by default
BACKLOG = 2048  # connections that wait to be accepted

log = logging.getLogger(__name__)


def launch(path: Path, host: str, port: int, engine: str, settings: Settings) -> None:
    """Serve a bundle until a signal ends it.

    Raises:
        BundleError: when the bundle cannot be read, or was altered.
        ConfigError: when the address cannot be bound, or the API keys cannot be read.
        EngineError: for an unknown engine, or one that cannot run the bundle.
    """
    bundle = open_bundle(path)
    check_kind(engine)
    with bind(host, port) as listener:
        app = prepare(bundle, engine, settings)
        photo = "examples/hat.jpg" if Path("examples/hat.jpg").is_file() else "photo.jpg"
        runtime, url = app.state.runtime, address(EVERYWHERE.get(host, host), port)
        lines = [
            f"serving {bundle.name} from {path} at {address(host, port)}",
            f"model fingerprint {bundle.fingerprint}, engine fingerprint {runtime.fingerprint} "
            f"({runtime.engine.name} in {runtime.engine.precision})",
            f"open {url}/docs in a browser, or try: curl -F image=@{photo} {url}/embed",
        ]
        folder = str(app.state.jobs.folder) if app.state.jobs else None
        if folder:
            lines.append(f"jobs may read below {', '.join(settings.jobs_roots)} and write to {folder}")
        if host not in LOOPBACK and not (settings.api_keys or os.environ.get(auth.VARIABLE)):
            lines.append(open_door(host, settings.jobs_roots, folder))
        print("\n".join(lines), flush=True)  # noqa: T201
        run(app, listener)


def address(host: str, port: int) -> str:
    """The URL of a server; an IPv6 address stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_door(host: str, jobs_roots: Sequence[str], jobs_folder: str | None) -> str:
    """The warning of a server that others reach without a key: what they can do, and how to prevent it."""
    abilities = ["use the model, at the cost of this machine's processors and memory", "read /model and /metrics"]
    if jobs_folder:
        abilities += [
            f"learn which images lie below {', '.join(jobs_roots)} and download their features",
            "see, cancel and delete everybody's jobs",
            f"fill the disk of {jobs_folder}",
        ]
    return (
        f"WARNING: no API key is set, and {host} can be reached from other machines. Anyone who reaches it can "
        f"{'; '.join(abilities)}. Requests and answers travel unencrypted. "
        "Require a key with --api-keys FILE and put TLS in front, or keep --host 127.0.0.1."
    )


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that no client connects before the model is loaded.

    Raises:
        ConfigError: when the address cannot be bound.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use: choose another with --port.") from error
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror or error}.") from error
    return listener


def prepare(bundle: Bundle, engine: str, settings: Settings) -> Starlette:
    """The app with its engine loaded and warm.

    Raises:
        BundleError, EngineError, ConfigError: when the bundle cannot be served.
    """
    warnings.filterwarnings("ignore", module="PIL")  # about odd files that decode all the same
    logging.config.dictConfig(log_config(settings.log_format))
    app = create_app(settings)
    app.state.runtime = open_runtime(bundle, engine, settings, app.state.metrics)
    if settings.jobs_roots:
        app.state.jobs = JobRunner(settings, bundle, engine)
    return app


def run(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until a signal; then drain those in flight."""
    config = server_config(app)
    tune_garbage_collection()
    tune_allocation()
    allow_connections()
    sys.setswitchinterval(SWITCH_SECONDS)
    if app.state.jobs:
        app.state.jobs.start(app.state.metrics)
    try:
        _Server(config, app.state).run([listener])
    finally:
        if app.state.jobs:
            app.state.jobs.close()
        app.state.runtime.close()


def server_config(app: Starlette) -> uvicorn.Config:
    """The configuration of uvicorn: our protocol, and nothing that we do not use."""
    settings: Settings = app.state.settings
    return uvicorn.Config(
        app,
        http=protocol_class(settings, app.state.metrics),
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
    )


class _Server(uvicorn.Server):
    """uvicorn, except that it exits with code 0 after SIGTERM and SIGINT instead of raising them again."""

    def __init__(self, config: uvicorn.Config, state: Any) -> None:
        super().__init__(config)
        self.state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Treat a shutdown on request as success."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, then drain the requests in flight."""
        self.state.draining = True
        if self.state.jobs:
            self.state.jobs.stop()  # its batch ends in the meantime
        log.info("shutting down: %d requests in flight", len(self.server_state.tasks))
        await super().shutdown(sockets)


def tune_garbage_collection() -> None:
    """Freeze what is loaded: scanning it again and again took p99 from 67 to 266 ms (BentoML 1.4.39)."""
    gc.collect()
    gc.freeze()
    # A request leaves a cycle that may outlive the youngest generation. With 50 here, as for BentoML, the next
    # generation was collected every five minutes, and memory grew by 7 MB per minute until then.
    gc.set_threshold(50_000, 8, 100)


def tune_allocation() -> None:
    """Let glibc return what is 4 MiB or larger as soon as it is freed.

    By itself it raises this limit to 32 MiB with the first such piece that is freed, and keeps what is smaller: 200 MB
    after some answers of 15 MB in JSON.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**22)


def allow_connections() -> None:
    """Raise the limit on open files as far as this user may: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
