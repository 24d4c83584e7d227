"""Errors of a request, and what the client is told of them: a status and one sentence, as OpenAI's clients read it."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mixmim_serve.errors import MAX_QUOTED, BundleError, ConfigError, ImageError, MixMIMError

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
SERVER_FAILED = "the server failed on this request; its log has the reason."


class RequestError(MixMIMError):
    """A request that cannot be answered; `param` names the offending part, `code` the reason in one word."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}
        self.param = param and param[:MAX_QUOTED]


def image_refused(error: ImageError, param: str) -> RequestError:
    """The error of one image as an error of its request; `param` says which image, such as `input[3]`."""
    return RequestError(error.status, error.code, str(error), param)


def describe_error(error: Exception) -> tuple[int, dict[str, str | None]]:
    """Status and `{message, type, param, code}`. An unexpected error reveals nothing about the machine."""
    param = getattr(error, "param", None)
    if isinstance(error, RequestError):
        status, code, message = error.status, error.code, str(error)
    elif isinstance(error, HTTPException):
        status, code, message = error.status_code, f"http_{error.status_code}", str(error.detail)
    elif isinstance(error, ClientDisconnect):
        status, code, message = 400, "client_left", "the client disconnected before its request was read."
    elif isinstance(error, ConfigError):
        status, code, message = 400, "bad_option", str(error)
    elif isinstance(error, BundleError):
        status, code, message = 404, "not_in_this_model", str(error)
    else:
        status, code, message = 500, "server_failed", SERVER_FAILED
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"message": message, "type": kind, "param": param, "code": code}
