"""Options in a request's query string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from mixmim_serve.service.problems import RequestError

Number = TypeVar("Number", int, float)


def number(request: Request, name: str, default: Number, low: Number, high: Number) -> Number:
    """A number of the type of its default.

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
        raise RequestError(400, "bad_option", f"{name} must be {kind} from {low} to {high}, got {text!r}.", name)
    return value


def choice(request: Request, name: str, default: str, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
        RequestError: for another.
    """
    text = request.query_params.get(name, default)
    if text not in choices:
        raise RequestError(400, "bad_option", f"{name} must be one of {', '.join(choices)}, got {text!r}.", name)
    return text


def switch(request: Request, name: str) -> bool:
    """Off unless it is true."""
    return choice(request, name, "false", ("true", "false")) == "true"


def several(request: Request, name: str, default: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Words between commas, each once.

    Raises:
        RequestError: for one that is not among the choices.
    """
    found = tuple(dict.fromkeys(request.query_params.get(name, default).split(",")))
    for word in found:
        if word not in choices:
            raise RequestError(400, "bad_option", f"{name} must be of {', '.join(choices)}, got {word!r}.", name)
    return found


def only(request: Request, *names: str) -> None:
    """Refuse options that a route does not have, which would be misspelt.

    Raises:
        RequestError: naming one.
    """
    for name in request.query_params:
        if name not in names:
            known = f"the options are {', '.join(names)}" if names else "there are none"
            raise RequestError(400, "unknown_option", f"no option {name!r} here: {known}.", name)
