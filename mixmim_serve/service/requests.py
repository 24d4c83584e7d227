"""Images out of an HTTP request, under limits, and errors as answers.

Nothing that a client sends is ever used as a path or a URL: an image is bytes in the body.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixmim_serve.errors import BundleError, ConfigError, ImageError, MixMIMError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
MAX_IMAGES = 64  # in one request
FIELD = "image"

Number = TypeVar("Number", int, float)

HOW_TO_SEND = f"send multipart files named {FIELD!r}, or one image as the body with an image/* content type."


class RequestError(MixMIMError):
    """A request that cannot be answered; `param` names the offending part."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class LimitBody:
    """Middleware that refuses large bodies: at once by Content-Length, else as soon as the limit has been read."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        await self.app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is above {self.max_bytes // 2**20} MiB: send fewer or smaller images.")


async def read_images(request: Request) -> list[bytes]:
    """The encoded images of a request, in order.

    Raises:
        RequestError: when there are none, too many, or the body is of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/"):
        return [await request.body()]
    if kind != "multipart/form-data":
        raise RequestError(415, f"content type {kind or 'missing'!r} is not accepted: {HOW_TO_SEND}")
    try:
        async with request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES) as form:
            parts = form.getlist(FIELD)
            if not parts:
                raise RequestError(400, f"the form has no field {FIELD!r}: {HOW_TO_SEND}", FIELD)
            return [await _read_part(part, number) for number, part in enumerate(parts)]
    except HTTPException as error:  # of Starlette's parser
        if not error.detail.startswith("Too many"):
            raise
        raise RequestError(413, f"more than {MAX_IMAGES} parts in one request: send several.", FIELD) from error


async def _read_part(part: UploadFile | str, number: int) -> bytes:
    if isinstance(part, str):
        raise RequestError(400, f"field {FIELD!r} must be a file, not text: {HOW_TO_SEND}", f"{FIELD}[{number}]")
    return await part.read()


def query_number(request: Request, name: str, default: Number, low: Number, high: Number) -> Number:
    """A number from the query string, of the type of its default.

    Raises:
        RequestError: when it is no such number, or out of range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = type(default)(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise RequestError(400, f"{name} must be {kind} from {low} to {high}, got {text!r}.", name)
    return value


def error_response(error: Exception) -> JSONResponse:
    """One sentence with its status; what is not an error of ours says nothing of the machine."""
    param = getattr(error, "param", None)
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestError | ImageError):
        status, message = error.status, str(error)
    elif isinstance(error, ClientDisconnect):
        status, message = 400, "the client left before its request was read."  # nobody reads this answer
    elif isinstance(error, ConfigError):
        status, message = 400, str(error)
    elif isinstance(error, BundleError):
        status, message = 404, str(error)
    else:
        status, message = 500, "the server failed on this request; its log has the reason."
    headers = {"Retry-After": "1"} if status in (429, 503) else getattr(error, "headers", None)
    return JSONResponse({"error": {"message": message, "param": param}}, status, headers)


def exception_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[JSONResponse]]]:
    """For Starlette: the family of ours, its own HTTP exceptions and whatever else goes wrong, in one shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error)
        if response.status_code == 500 and isinstance(error, MixMIMError):  # others are raised again and logged
            log.error("%s failed", request.url.path, exc_info=error)
        return response

    return {MixMIMError: answer, HTTPException: answer, ClientDisconnect: answer, Exception: answer}
