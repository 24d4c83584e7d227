"""What happens around every route: authentication, admission, deadline, headers, metrics, access log, errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixmim_serve.errors import MixMIMError, quoted
from mixmim_serve.service import body as bodies
from mixmim_serve.service.auth import ApiKeys
from mixmim_serve.service.errors import RequestError, describe_error
from mixmim_serve.service.metrics import UNKNOWN_ROUTE, Metrics, log_access
from mixmim_serve.service.request import Admission, Endpoint, RequestContext, begin_request, context_of
from mixmim_serve.service.responses import json_response
from mixmim_serve.service.runtime import require_runtime
from mixmim_serve.service.settings import MAX_REQUEST_TIMEOUT, Settings

PIECE = 262_144  # bytes of a response handed to the transport at once
CLIENT_CLOSED = 499  # nginx's status for a client that left before its answer; nobody receives it

log = logging.getLogger(__name__)


class RequestMiddleware:
    """ASGI middleware around all routes."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        keys: ApiKeys,
        admission: Admission,
        endpoints: Sequence[Endpoint],
    ) -> None:
        self.app, self.settings, self.metrics, self.keys, self.admission = app, settings, metrics, keys, admission
        self.endpoints = {(endpoint.method, endpoint.path): endpoint for endpoint in endpoints}
        self.paths = frozenset(endpoint.path for endpoint in endpoints)
        self.open_paths = frozenset(endpoint.path for endpoint in endpoints if endpoint.is_open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, answer its errors, and record it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = begin_request(scope, self.endpoints.get((scope["method"], scope["path"])), self.admission)
        responder = _Responder(send, context)
        try:
            await self.handle(scope, receive, responder, context)
        except Exception as error:  # errors of the routes themselves were answered further in
            if responder.status is None:
                await error_response(Request(scope), error)(scope, receive, responder)
            else:
                context.error_code = context.error_code or "broken_off"
                raise
        finally:
            self._record(context, responder.status or CLIENT_CLOSED)

    async def handle(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        """Authenticate, then run the route; a POST within its limits of bytes, places and time.

        Raises:
            RequestError: 401, 413, 429, 503 or 504.
        """
        headers, endpoint = Headers(scope=scope), context.endpoint
        if context.path not in self.open_paths and (key := self.keys.check(headers)):
            context.reservation.client = key
        if endpoint is None or endpoint.method != "POST":
            await self.app(scope, receive, send)
            return
        require_runtime(scope["app"].state)
        body = bodies.Body(scope, receive, self.settings, context)
        if not endpoint.streams:
            body.check_content_length()
        scope[bodies.KEY] = body
        seconds = self._timeout(headers, None if endpoint.streams else self.settings.request_seconds)
        with context.reservation as reservation:
            if endpoint.takes_place and not endpoint.streams:
                self.admission.check_room(reservation.client)
            await run_until_disconnect(self.app(scope, body, send), body, seconds, context)

    def _timeout(self, headers: Headers, default: float | None) -> float | None:
        """Seconds that the client, or else the operator, gives the request."""
        text = headers.get("x-request-timeout")
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= MAX_REQUEST_TIMEOUT:
            limit = f"{MAX_REQUEST_TIMEOUT:g}"
            message = f"X-Request-Timeout must be seconds above 0 and up to {limit}, got {quoted(text)}."
            raise RequestError(400, "bad_option", message, "X-Request-Timeout")
        return min(value, self.settings.max_request_seconds)

    def _record(self, context: RequestContext, status: int) -> None:
        """Count the request in the metrics, and log it unless its path is open to all."""
        route = context.path if context.path in self.paths else UNKNOWN_ROUTE
        seconds = time.perf_counter() - context.started
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        self.metrics.observe_stages(context.stage_seconds)
        if context.images and status < 400:
            self.metrics.images.labels(route).inc(context.images)
        if context.error_code:
            self.metrics.count_failure(context.error_code)
        if context.path not in self.open_paths:
            log_access(context, status, seconds)


async def run_until_disconnect(
    route: Awaitable[None], body: bodies.Body, seconds: float | None, context: RequestContext
) -> None:
    """Run a route until it ends, its client disconnects or its deadline passes; then all its work is cancelled.

    Raises:
        RequestError: 504 when the deadline passes first.
    """
    work = asyncio.ensure_future(route)
    disconnect = asyncio.ensure_future(body.wait_for_disconnect())
    try:
        done, _ = await asyncio.wait({work, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done and context.responding and not (context.endpoint and context.endpoint.streams):
            # The answer was ready in time; how long it may take to be sent, the protocol limits.
            done, _ = await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            work.result()
        elif disconnect in done:
            context.error_code = "client_left"
        else:
            message = f"no answer within {seconds:g} s: try again when the server is less busy, or allow more time."
            raise RequestError(504, "deadline", message)
    finally:
        disconnect.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


class _Responder:
    """Wraps ASGI's `send`: adds the headers that every response carries, notes its status, cuts large bodies in pieces.

    uvicorn's `send` writes all it is given at once and waits only before the next call. In pieces, with an empty one at
    the end, a response ends when its client has read it, and so do the places and bytes that its request holds.
    """

    def __init__(self, send: Send, context: RequestContext) -> None:
        self.send, self.context = send, context
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.context.responding = message["status"], True
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.context.id
            if timing := self.context.server_timing():
                headers["Server-Timing"] = timing
        elif len(body := message.get("body", b"")) > PIECE:
            for start in range(0, len(body), PIECE):
                await self.send({**message, "body": body[start : start + PIECE], "more_body": True})
            message = {**message, "body": b""}
        await self.send(message)


def error_response(request: Request, error: Exception) -> Response:
    """The response to a request that failed."""
    status, fields = describe_error(error)
    context = context_of(request)
    context.error_code = fields["code"]
    if status == 500:
        log.error("%s failed, request %s", context.path, context.id, exc_info=error)
    return json_response({"error": fields}, status, dict(getattr(error, "headers", None) or {}))


def exception_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """Starlette's table of handlers: our errors, its HTTP exceptions and disconnects are answered in one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    return {MixMIMError: answer, HTTPException: answer, ClientDisconnect: answer}
