"""Convert the server's responses to arrays or exceptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from mixmim_serve.errors import (
    ImageError,
    ImageTooLargeError,
    MixMIMError,
    RefusedError,
    ServerError,
    UndecodableImageError,
    UnsupportedImageError,
)

Value = TypeVar("Value")
Arrays = dict[str, NDArray[Any]]

IMAGE_ERRORS = {
    kind.code: kind for kind in (ImageError, UnsupportedImageError, ImageTooLargeError, UndecodableImageError)
}
NONE_GOOD = "no_good_image"  # error code of a response with an error for each image


@dataclass(frozen=True)
class Reply:
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes

    @property
    def problem(self) -> dict[str, Any]:
        """The error's `message`, `code` and `param`; empty if the response has no error of mixmim-serve."""
        try:
            error = json.loads(self.content)["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return error if isinstance(error, dict) else {}

    @property
    def reason(self) -> str:
        """The error's message."""
        return self.problem.get("message") or "the server gave no reason: check that the URL is that of mixmim-serve."


def is_result(reply: Reply) -> bool:
    """Whether a response has a result or an error for each image."""
    return 200 <= reply.status < 300 or reply.problem.get("code") == NONE_GOOD


def read_as(read: Callable[[Reply], Value], reply: Reply) -> Value:
    """Parse a response with `read`.

    Raises:
        ServerError: when it cannot be parsed, because it is not of the requested type.
    """
    try:
        return read(reply)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        kind = reply.headers.get("content-type", "no content type")
        raise ServerError(
            f"the response ({kind}) cannot be read: check that the URL is that of mixmim-serve.", reply.status
        ) from error


def error_of(reply: Reply, images: int, request: str) -> MixMIMError:
    """The exception for an error response to a request with `images` images."""
    problem = reply.problem
    code, param = problem.get("code"), problem.get("param")
    if code in IMAGE_ERRORS:
        return image_error(problem)
    if reply.status == 413 and images == 1:
        return ImageTooLargeError(reply.reason)
    kind = RefusedError if 400 <= reply.status < 500 else ServerError
    return kind(f"{reply.status}: {reply.reason}", reply.status, code, param, request)


def image_error(problem: Mapping[str, Any]) -> ImageError:
    """The exception for one rejected image; an unknown code gives a plain `ImageError`."""
    error = IMAGE_ERRORS.get(problem.get("code", ""), ImageError)(problem["message"])
    error.param = problem.get("param")
    return error


def read_json(reply: Reply) -> dict[str, Any]:
    """Parse a JSON object."""
    values: dict[str, Any] = json.loads(reply.content)
    return values


def read_arrays(reply: Reply) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a safetensors file, and the metadata in its header."""
    header = json.loads(reply.content[8 : 8 + int.from_bytes(reply.content[:8], "little")])
    return load(reply.content), header["__metadata__"]


def read_each(reply: Reply, images: int, make: Callable[[Arrays, dict[str, str]], Value]) -> list[Value | ImageError]:
    """A result per image, built by `make` from its arrays and the metadata, or the error of a rejected image.

    Raises:
        ServerError: when the response has another number of images.
    """
    if reply.status != 200:
        entries = read_json(reply)["data"]
        _check_count(len(entries), images)
        return [image_error(entry["error"]) for entry in entries]
    arrays, metadata = read_arrays(reply)
    for array in arrays.values():
        _check_count(len(array), images)
    errors = json.loads(metadata.get("errors", "{}"))
    return [
        image_error(errors[str(row)]) if str(row) in errors else make(_row(arrays, row), metadata)
        for row in range(images)
    ]


def _row(arrays: Arrays, row: int) -> Arrays:
    """Copies, so that one result does not keep the whole batch in memory."""
    return {name: np.array(array[row]) for name, array in arrays.items()}


def _check_count(results: int, images: int) -> None:
    if results != images:
        raise ServerError(f"the server sent {results} results for {images} images: check that its version matches.")
