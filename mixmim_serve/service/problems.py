"""Errors as answers: one sentence, a status, and where; in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mixmim_serve.errors import BundleError, ConfigError, ImageError, MixMIMError
from mixmim_serve.service.encoding import json_response
from mixmim_serve.service.visit import visit_of

log = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
SERVER_FAILED = "the server failed on this request; its log has the reason."


class RequestError(MixMIMError):
    """A request that cannot be answered; `param` names the offending part, `code` the reason in one word."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


def refused(error: ImageError, param: str) -> RequestError:
    """What is wrong with one image, and which."""
    return RequestError(error.status, error.code, str(error), param)


def describe(error: Exception) -> tuple[int, dict[str, str | None]]:
    """Status and `{message, type, param, code}`; what is not an error of ours says nothing of the machine."""
    param = getattr(error, "param", None)
    if isinstance(error, RequestError):
        status, code, message = error.status, error.code, str(error)
    elif isinstance(error, HTTPException):
        status, code, message = error.status_code, f"http_{error.status_code}", str(error.detail)
    elif isinstance(error, ClientDisconnect):
        status, code, message = 400, "client_left", "the client left before its request was read."  # read by nobody
    elif isinstance(error, ConfigError):
        status, code, message = 400, "bad_option", str(error)
    elif isinstance(error, BundleError):
        status, code, message = 404, "not_in_this_model", str(error)
    else:
        status, code, message = 500, "server_failed", SERVER_FAILED
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"message": message, "type": kind, "param": param, "code": code}


def error_response(request: Request, error: Exception) -> Response:
    """The answer to a request that failed."""
    status, about = describe(error)
    visit_of(request).code = about["code"]
    if status == 500:
        log.error("%s failed, request %s", request.url.path, visit_of(request).id, exc_info=error)
    headers = dict(getattr(error, "headers", None) or {})
    return json_response({"error": about}, status, headers)


def exception_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """For Starlette: the family of ours, its own HTTP exceptions and whatever else goes wrong, in one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    return {MixMIMError: answer, HTTPException: answer, ClientDisconnect: answer}
