"""What happens to every request around its route: keys, admission, deadline, headers, metrics, the access log."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixmim_serve.service import body as bodies
from mixmim_serve.service.access_log import log_access
from mixmim_serve.service.keys import Keys
from mixmim_serve.service.metrics import OTHER, Metrics
from mixmim_serve.service.problems import RequestError, error_response
from mixmim_serve.service.routes.about import DOCS_ASSETS
from mixmim_serve.service.runtime import require_runtime
from mixmim_serve.service.settings import LONGEST_DEADLINE, Settings
from mixmim_serve.service.visit import Visit, begin

# No key is asked for, no log line is written.
OPEN = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/openapi.json", "/docs", *DOCS_ASSETS})

STREAMS = frozenset({"/embed/stream"})  # as long as they like, in bytes and time: their pieces have limits
LEFT = 499  # nginx's status for a client that left before its answer; nobody receives it


class Front:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, keys: Keys, routes: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.keys, self.routes = app, settings, metrics, keys, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = begin(scope)
        reply = _Reply(send, visit)
        try:
            await self._attend(scope, receive, reply, visit)
        except Exception as error:  # of ours, or a bug; the route's own were answered further in
            if reply.status is None:
                await error_response(Request(scope), error)(scope, receive, reply)
            else:
                visit.code = visit.code or "broken_off"
                raise
        finally:
            self._account(visit, reply.status or LEFT)

    async def _attend(self, scope: Scope, receive: Receive, reply: _Reply, visit: Visit) -> None:
        """Decide whether it may come in; then let the route work for as long as the client waits."""
        if visit.path not in self.routes or scope["method"] != "POST":
            if visit.path not in OPEN:
                self.keys.check(Headers(scope=scope))
            await self.app(scope, receive, reply)
            return
        headers = Headers(scope=scope)
        self.keys.check(headers)
        runtime = require_runtime(scope["app"].state)
        body = bodies.Body(scope, receive, self.settings, visit)
        stream = visit.path in STREAMS
        if not stream:
            body.check_announced()
        scope[bodies.KEY] = body
        seconds = self._seconds(headers, None if stream else self.settings.request_seconds)
        with runtime.admission.enter() as ticket:
            visit.ticket = ticket
            await self._while_waited_for(self.app(scope, body, reply), body, seconds, visit)

    async def _while_waited_for(self, route: object, body: bodies.Body, seconds: float | None, visit: Visit) -> None:
        """Run the route until it ends, the client leaves or the deadline passes; then nothing of it goes on."""
        work = asyncio.ensure_future(route)  # type: ignore[call-overload]
        left = asyncio.ensure_future(body.left())
        try:
            done, _ = await asyncio.wait({work, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
            elif left in done:
                visit.code = "client_left"
            else:
                message = f"no answer within {seconds:g} s: ask again when the server is less busy, or wait longer."
                raise RequestError(504, "deadline", message)
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})

    def _seconds(self, headers: Headers, default: float | None) -> float | None:
        """Until the deadline."""
        text = headers.get("x-request-timeout")
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= LONGEST_DEADLINE:
            message = f"X-Request-Timeout must be seconds above 0 and up to {LONGEST_DEADLINE:g}, got {text!r}."
            raise RequestError(400, "bad_option", message, "X-Request-Timeout")
        return value

    def _account(self, visit: Visit, status: int) -> None:
        route = visit.path if visit.path in self.routes or visit.path in OPEN else OTHER
        seconds = time.perf_counter() - visit.began
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        self.metrics.observe_stages(visit.seconds)
        if visit.images and status < 400:
            self.metrics.images.labels(route).inc(visit.images)
        if visit.code:
            self.metrics.fail(visit.code)
        if visit.path not in OPEN:
            log_access(visit, status, seconds)


class _Reply:
    """Stands in for ASGI's `send`: adds the headers that every answer has, and notes its status."""

    def __init__(self, send: Send, visit: Visit) -> None:
        self.send, self.visit = send, visit
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.visit.id
            if timing := self.visit.server_timing():
                headers["Server-Timing"] = timing
        await self.send(message)
