"""The process that `mixmim serve` becomes: uvicorn with our app, and nothing between them.

BentoML's own server took a third of a millisecond more for each request (docs/decisions.md); bentos still run in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import logging.config
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mixmim_serve.bundle import Bundle
from mixmim_serve.service.access_log import log_config
from mixmim_serve.service.app import create_app
from mixmim_serve.service.jobs.runner import Jobs
from mixmim_serve.service.runtime import open_runtime
from mixmim_serve.service.settings import Settings

BACKLOG = 2048  # connections that wait to be accepted

log = logging.getLogger(__name__)


def prepare(bundle: Bundle, engine: str, settings: Settings) -> Starlette:
    """The app with its engine, loaded and warm.

    Raises:
        BundleError, EngineError, ConfigError: when the bundle cannot be served.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of odd files that decode all the same
    logging.config.dictConfig(log_config(settings.log_format))
    app = create_app(settings)
    app.state.runtime = open_runtime(bundle, engine, settings, app.state.metrics)
    if settings.jobs_roots:
        app.state.jobs = Jobs(settings, bundle, engine)
    return app


def run(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until a signal ends it and what was in flight is done."""
    settings: Settings = app.state.settings
    config = uvicorn.Config(
        app,
        http=_protocol(settings.header_seconds),
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
    )
    tune_garbage_collection()
    allow_connections()
    if app.state.jobs:
        app.state.jobs.start(app.state.metrics)
    try:
        _Server(config, app.state).run([listener])
    finally:
        if app.state.jobs:
            app.state.jobs.close()
        app.state.runtime.close()


class _Server(uvicorn.Server):
    """uvicorn, that ends well after SIGTERM and SIGINT instead of dying of them once more."""

    def __init__(self, config: uvicorn.Config, state: Any) -> None:
        super().__init__(config)
        self.state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals ask for an end; having ended is no failure."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, then wait for what is in flight."""
        self.state.draining = True
        if self.state.jobs:
            self.state.jobs.stop()  # its batch ends meanwhile
        log.info("shutting down: %d requests in flight", len(self.server_state.tasks))
        await super().shutdown(sockets)


def _protocol(header_seconds: float) -> type[HttpToolsProtocol]:
    class Protocol(HttpToolsProtocol):
        """Closes connections that do not say what they want, which uvicorn would keep for ever."""

        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._patience = self.loop.call_later(header_seconds, transport.close)

        def on_headers_complete(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._patience is not None:
                self._patience.cancel()
            super().connection_lost(exc)

    return Protocol


def tune_garbage_collection() -> None:
    """What lives now lives for ever: scanning it again and again took p99 from 67 to 266 ms (BentoML 1.4.39)."""
    gc.collect()
    gc.freeze()
    # A request leaves a cycle that may outlive the youngest generation; with 50 here, as for BentoML, the next one was
    # looked at every five minutes, and memory grew by 7 MB a minute until then.
    gc.set_threshold(50_000, 8, 100)


def allow_connections() -> None:
    """As many open files as this user may have: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
