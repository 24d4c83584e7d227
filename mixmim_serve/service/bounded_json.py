"""JSON from a client, refused before it costs more memory than its bytes."""

from __future__ import annotations

from typing import Any

import orjson

from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.settings import Settings

MAX_DEPTH = 16
MAX_PARTS = 10_000  # of lists and objects, besides two for each image


def load_json(data: bytes, max_items: int = Settings.max_items) -> Any:
    """A JSON value of bounded depth and number of parts, which are counted before it is parsed: each costs memory.

    Raises:
        RequestError: its message is the end of a sentence about `data`.
    """
    if has_more_parts(data, MAX_PARTS + 2 * max_items):
        raise RequestError(413, "json_too_complex", "has far more values than images could need")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, "malformed_json", f"is not valid JSON ({error})") from error
    if is_deeper(value, MAX_DEPTH):
        raise RequestError(413, "json_too_complex", f"is nested more than {MAX_DEPTH} deep")
    return value


def has_more_parts(data: bytes, most: int) -> bool:
    """Whether JSON may hold more than 2 * `most` + 1 values, keys among them.

    Each member of an object, at most two values, comes after a `{` or a comma, and each element of a list after a `[`
    or a comma. Those within strings count too: an image as a data URI has one comma, base64 has none. Looking for
    them costs 1 ms for 20 MB of base64, and nothing is kept.
    """
    count = 0
    for mark in (b",", b"[", b"{"):
        position = data.find(mark)
        while position >= 0:
            count += 1
            if count > most:
                return True
            position = data.find(mark, position + 1)
    return False


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    level = [value]
    for _ in range(most + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    return True
