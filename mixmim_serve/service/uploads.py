"""Images out of an HTTP request: a multipart form, one image as the body, or JSON with base64.

Nothing that a client sends is ever used as a path or a URL: an image is bytes in the body.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mixmim_serve.errors import quoted
from mixmim_serve.service.body import Part, body_of, split_form, stream_chunks
from mixmim_serve.service.bounded_json import load_json
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.request import context_of
from mixmim_serve.service.settings import Settings

FIELD = "image"  # of a form
KEY = "input"  # of JSON
MAX_FIELDS = 32  # parts of a form that are not images
MAX_TEXT = 1024  # bytes of a text field that a route reads
HOW_TO_SEND = (
    f"send a form with files named {FIELD!r}, one image as the body with an image/* content type, "
    f'or JSON such as {{"{KEY}": ["data:image/jpeg;base64,..."]}}.'
)


@dataclass(frozen=True)
class Uploads:
    """The encoded images of a request, in order; `alone` if one came by itself, so that the answer is flat."""

    images: Sequence[bytes | RequestError]
    alone: bool
    texts: Mapping[str, str] = field(default_factory=dict)  # text fields of a form that the route reads


async def read_images(request: Request, settings: Settings, texts: Sequence[str] = ()) -> Uploads:
    """The images of a request, with a place reserved for each; of a form also the text fields named `texts`.

    Raises:
        RequestError: when there are none, too many, or the body is of another type.
    """
    kind = media_type(request)
    if kind.startswith("image/"):
        uploads = Uploads([await request.body()], alone=True)
    elif kind == "multipart/form-data":
        found: dict[str, str] = {}
        parts = form_images(request, settings, settings.max_items, texts, found)
        images = [part.data async for part in parts]
        if not images:
            raise RequestError(400, "no_image", f"the form has no field {FIELD!r}: {HOW_TO_SEND}", FIELD)
        uploads = Uploads(images, len(images) == 1, found)
    elif kind == "application/json":
        uploads = _from_json(await request.body(), settings.max_items)
    else:
        message = f"content type {quoted(kind or 'missing')} is not accepted: {HOW_TO_SEND}"
        raise RequestError(415, "unsupported_body", message)
    context_of(request).expect_images(len(uploads.images))
    return uploads


def media_type(request: Request) -> str:
    """The media type of the body, in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def form_images(
    request: Request, settings: Settings, most: int, texts: Sequence[str] = (), found: dict[str, str] | None = None
) -> AsyncIterator[Part]:
    """The images of a multipart form, each as soon as it is complete; text fields named `texts` go into `found`.

    Raises:
        RequestError: for more than `most` images, or a form that cannot be read.
    """
    images = fields = 0
    content_type = request.headers["content-type"]
    async for part in split_form(stream_chunks(body_of(request)), content_type, settings.max_image_bytes):
        if part.name != FIELD:
            fields += 1
            if fields > MAX_FIELDS:
                raise RequestError(413, "too_many_fields", f"more than {MAX_FIELDS} other fields: leave them out.")
            if found is not None and part.name in texts and not part.is_file:
                found[part.name] = part.data[:MAX_TEXT].decode("utf-8", "replace")
            continue
        images += 1
        if images > most:
            raise too_many_images(most, FIELD)
        if not part.is_file:
            message = f"field {FIELD!r} must be a file, not text: {HOW_TO_SEND}"
            raise RequestError(400, "not_a_file", message, f"input[{images - 1}]")
        yield part


def too_many_images(most: int, param: str) -> RequestError:
    """The error for a request with more images than one may hold."""
    message = f"more than {most} images in one request: split them into several requests."
    return RequestError(413, "too_many_images", message, param)


def parse_json(body: bytes, how_to_send: str = HOW_TO_SEND, max_items: int = Settings.max_items) -> dict[str, Any]:
    """A JSON object; `how_to_send` tells the client what was expected.

    Raises:
        RequestError: 400 for anything else, 413 for too many values.
    """
    try:
        value = load_json(body, max_items)
    except RequestError as error:
        raise RequestError(error.status, error.code, f"the body {error}: {how_to_send}") from error
    if not isinstance(value, dict):
        raise RequestError(400, "malformed_json", f"the body is not a JSON object: {how_to_send}")
    return value


def decode_inputs(value: Any, most: int) -> Uploads:
    """The images under `input`, a string or a list of strings; one that holds no image is an error in its place.

    Raises:
        RequestError: for another type, none, or too many.
    """
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise RequestError(400, "no_image", f"{KEY} must be a string or a list of strings: {HOW_TO_SEND}", KEY)
    if not strings:
        raise RequestError(400, "no_image", f"{KEY} is empty: {HOW_TO_SEND}", KEY)
    if len(strings) > most:
        raise too_many_images(most, KEY)
    images = [_image_or_error(string, f"{KEY}[{index}]") for index, string in enumerate(strings)]
    return Uploads(images, alone=isinstance(value, str))


def _from_json(body: bytes, most: int) -> Uploads:
    values = parse_json(body, max_items=most)
    for name in values:
        if name != KEY:
            message = f"unknown key {quoted(name)}: the body takes only {KEY!r}; options go into the URL."
            raise RequestError(400, "unknown_key", message, name)
    return decode_inputs(values.get(KEY), most)


def _image_or_error(value: Any, param: str) -> bytes | RequestError:
    try:
        return from_base64(value, param)
    except RequestError as error:
        return error


def from_base64(value: Any, param: str) -> bytes:
    """The bytes of a data URI, or of base64 alone.

    Raises:
        RequestError: 400, for a URL too: it is never fetched.
    """
    if not isinstance(value, str):
        message = f"an image must be a base64 string, got {type(value).__name__}."
        raise RequestError(400, "not_base64", message, param)
    head, comma, encoded = value.partition(",")
    if not comma:
        head, encoded = "", value
    if "://" in value[:64]:
        raise RequestError(400, "url", "URLs are not fetched: send the image itself, as a data URI.", param)
    if comma and not (head[:5].lower() == "data:" and head[-7:].lower() == ";base64"):
        raise RequestError(400, "not_base64", "a data URI must begin like data:image/jpeg;base64,", param)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        message = "the string is not base64: send data:image/jpeg;base64,..."
        raise RequestError(400, "not_base64", message, param) from error
