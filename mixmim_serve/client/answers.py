"""Answers of the server as arrays, or as errors of ours."""

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

Made = TypeVar("Made")
Arrays = dict[str, NDArray[Any]]

IMAGE_ERRORS = {
    kind.code: kind for kind in (ImageError, UnsupportedImageError, ImageTooLargeError, UndecodableImageError)
}
NONE_GOOD = "no_good_image"  # the code of an answer with a reason for each image


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes

    @property
    def problem(self) -> dict[str, Any]:
        """The error's `message`, `code` and `param`; empty when it is none of our server's."""
        try:
            found = json.loads(self.content)["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def reason(self) -> str:
        """In words."""
        return self.problem.get("message") or "the server gave no reason: see whether the URL is that of mixmim-serve."


def is_result(reply: Reply) -> bool:
    """Whether an answer has something for each image, be it the reason why none is good."""
    return 200 <= reply.status < 300 or reply.problem.get("code") == NONE_GOOD


def read_as(read: Callable[[Reply], Made], reply: Reply) -> Made:
    """What `read` makes of a result.

    Raises:
        ServerError: when that fails, because the answer is of another kind than was asked for.
    """
    try:
        return read(reply)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        kind = reply.headers.get("content-type", "nothing")
        raise ServerError(
            f"the answer is {kind} that cannot be read: see whether the URL is that of mixmim-serve.", reply.status
        ) from error


def error_of(reply: Reply, images: int, request: str) -> MixMIMError:
    """An answer that is no result; `images` is how many were sent."""
    problem = reply.problem
    code, param = problem.get("code"), problem.get("param")
    if code in IMAGE_ERRORS:
        return image_error(problem)
    if reply.status == 413 and images == 1:
        return ImageTooLargeError(reply.reason)
    kind = RefusedError if 400 <= reply.status < 500 else ServerError
    return kind(f"{reply.status}: {reply.reason}", reply.status, code, param, request)


def image_error(problem: Mapping[str, Any]) -> ImageError:
    """Why one image was refused; a code that this version does not know is an `ImageError` all the same."""
    error = IMAGE_ERRORS.get(problem.get("code", ""), ImageError)(problem["message"])
    error.param = problem.get("param")
    return error


def read_json(reply: Reply) -> dict[str, Any]:
    """A JSON object."""
    found: dict[str, Any] = json.loads(reply.content)
    return found


def read_arrays(reply: Reply) -> tuple[Arrays, dict[str, str]]:
    """Arrays of a safetensors file, and the texts in its header."""
    header = json.loads(reply.content[8 : 8 + int.from_bytes(reply.content[:8], "little")])
    return load(reply.content), header["__metadata__"]


def each(reply: Reply, images: int, make: Callable[[Arrays, dict[str, str]], Made]) -> list[Made | ImageError]:
    """What `make` makes of each image's arrays, or why that image was refused.

    Raises:
        ServerError: when the answer is for another number of images.
    """
    if reply.status != 200:
        entries = read_json(reply)["data"]
        _check_count(len(entries), images)
        return [image_error(entry["error"]) for entry in entries]
    arrays, about = read_arrays(reply)
    for array in arrays.values():
        _check_count(len(array), images)
    errors = json.loads(about.get("errors", "{}"))
    return [
        image_error(errors[str(row)]) if str(row) in errors else make(_row(arrays, row), about) for row in range(images)
    ]


def _row(arrays: Arrays, row: int) -> Arrays:
    """Copied, so that one result does not keep those beside it in memory."""
    return {name: np.array(array[row]) for name, array in arrays.items()}


def _check_count(found: int, images: int) -> None:
    if found != images:
        raise ServerError(f"the server gave {found} results for {images} images: its version may not fit this client.")
