"""Images out of an HTTP request: a multipart form, one image as the body, or JSON with base64.

Nothing that a client sends is ever used as a path or a URL: an image is bytes in the body.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request

from mixmim_serve.service.body import body_of, pieces
from mixmim_serve.service.multipart import MAX_FIELDS, Part, parts
from mixmim_serve.service.problems import RequestError
from mixmim_serve.service.settings import Settings
from mixmim_serve.service.visit import visit_of

FIELD = "image"  # of a form
KEY = "input"  # of JSON
HOW_TO_SEND = (
    f"send a form with files named {FIELD!r}, one image as the body with an image/* content type, "
    f'or JSON such as {{"{KEY}": ["data:image/jpeg;base64,..."]}}.'
)


@dataclass(frozen=True)
class Sent:
    """The encoded images of a request, in order, and whether one came alone: then the answer is flat."""

    images: Sequence[bytes | RequestError]
    alone: bool


async def read_images(request: Request, settings: Settings) -> Sent:
    """The images of a request; places for them are taken.

    Raises:
        RequestError: when there are none, too many, or the body is of another type.
    """
    kind = media_type(request)
    if kind.startswith("image/"):
        sent = Sent([await request.body()], alone=True)
    elif kind == "multipart/form-data":
        files = [part.data async for part in form_files(request, settings, settings.max_items)]
        if not files:
            raise RequestError(400, "no_image", f"the form has no field {FIELD!r}: {HOW_TO_SEND}", FIELD)
        sent = Sent(files, alone=len(files) == 1)
    elif kind == "application/json":
        sent = _from_json(await request.body(), settings.max_items)
    else:
        message = f"content type {kind or 'missing'!r} is not accepted: {HOW_TO_SEND}"
        raise RequestError(415, "unsupported_body", message)
    visit_of(request).bring(len(sent.images))
    return sent


def media_type(request: Request) -> str:
    """Of the body, in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def form_files(request: Request, settings: Settings, most: int) -> AsyncIterator[Part]:
    """The images of a multipart form, each as soon as it is whole.

    Raises:
        RequestError: for more than `most`, or a form that cannot be read.
    """
    images = fields = 0
    content_type = request.headers["content-type"]
    async for part in parts(pieces(body_of(request)), content_type, settings.max_image_bytes):
        if part.name != FIELD:
            fields += 1
            if fields > MAX_FIELDS:
                raise RequestError(413, "too_many_fields", f"more than {MAX_FIELDS} other fields: leave them out.")
            continue
        images += 1
        if images > most:
            raise too_many(most, FIELD)
        if not part.is_file:
            raise RequestError(
                400, "not_a_file", f"field {FIELD!r} must be a file, not text: {HOW_TO_SEND}", f"input[{images - 1}]"
            )
        yield part


def too_many(most: int, param: str) -> RequestError:
    """The refusal of a request with more images than one may have."""
    return RequestError(413, "too_many_images", f"more than {most} images in one request: send several.", param)


def parse_json(body: bytes, how: str = HOW_TO_SEND) -> dict[str, Any]:
    """A JSON object; `how` tells the client what to send.

    Raises:
        RequestError: 400 for anything else.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, "malformed_json", f"the body is no JSON ({error}): {how}") from error
    if not isinstance(value, dict):
        raise RequestError(400, "malformed_json", f"the body is no JSON object: {how}")
    return value


def inputs_of(value: Any, most: int) -> Sent:
    """The images under `input`: one text or a list of them; a text that holds no image is refused in its place.

    Raises:
        RequestError: for another type, none, or too many.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        raise RequestError(400, "no_image", f"{KEY} must be a text or a list of them: {HOW_TO_SEND}", KEY)
    if not given:
        raise RequestError(400, "no_image", f"{KEY} is empty: {HOW_TO_SEND}", KEY)
    if len(given) > most:
        raise too_many(most, KEY)
    return Sent([_decoded(each, f"{KEY}[{index}]") for index, each in enumerate(given)], alone=isinstance(value, str))


def _from_json(body: bytes, most: int) -> Sent:
    values = parse_json(body)
    for name in values:
        if name != KEY:
            raise RequestError(400, "unknown_key", f"no key {name!r} here, only {KEY!r}; options are in the URL.", name)
    return inputs_of(values.get(KEY), most)


def _decoded(value: Any, param: str) -> bytes | RequestError:
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
        raise RequestError(400, "not_base64", f"an image must be a text of base64, got {type(value).__name__}.", param)
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
        message = "the text is not base64: send data:image/jpeg;base64,..."
        raise RequestError(400, "not_base64", message, param) from error
