"""What a client asked to get back, and how results are put into it.

JSON is for people and small answers. The binary forms (npy, npz, safetensors) hold one row an image; a row of NaN is
an image that could not be read, and `errors` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.service.encoding import JSON, json_bytes, json_response, npy_bytes, npz_bytes, safetensors_bytes
from mixmim_serve.service.problems import RequestError, describe
from mixmim_serve.service.query import choice

MEDIA_TYPES = {
    JSON: "json",
    "application/x-npy": "npy",
    "application/x-npz": "npz",
    "application/x-safetensors": "safetensors",
    "application/safetensors": "safetensors",
    "image/png": "png",
}
PREFERRED = {kind: media for media, kind in reversed(MEDIA_TYPES.items())}  # the first name of each kind
Floating = type[np.float32] | type[np.float16]
DTYPES: dict[str, Floating] = {"float32": np.float32, "float16": np.float16}

Item = Mapping[str, Any] | RequestError


@dataclass(frozen=True)
class Form:
    """How to write an answer."""

    kind: str
    dtype: Floating = np.float32

    @property
    def media_type(self) -> str:
        """The content type."""
        return PREFERRED[self.kind]


def form_of(request: Request, *kinds: str) -> Form:
    """What Accept asks for, of the kinds that a route can write, and `dtype`; the first kind is the default.

    Raises:
        RequestError: 406 when it wants none of them, 400 for another dtype.
    """
    dtype = DTYPES[choice(request, "dtype", "float32", tuple(DTYPES))]
    asked = request.headers.get("accept", "*/*").lower()
    for entry in asked.split(","):
        media = entry.partition(";")[0].strip()
        if media in ("", "*/*", f"{PREFERRED[kinds[0]].partition('/')[0]}/*"):
            return Form(kinds[0], dtype)
        if MEDIA_TYPES.get(media) in kinds:
            return Form(MEDIA_TYPES[media], dtype)
    raise RequestError(
        406, "not_acceptable", f"cannot answer as {asked!r}: accept {', '.join(PREFERRED[kind] for kind in kinds)}."
    )


def write(form: Form, items: Sequence[Item], about: dict[str, str], *, flat: bool) -> Response:
    """An answer with one entry an image: 200 when any of them is good, else 422; flat for an image that came alone.

    Raises:
        RequestError: of the image, when it came alone.
    """
    if flat and isinstance(items[0], RequestError):
        raise items[0]
    good = [item for item in items if not isinstance(item, RequestError)]
    if form.kind == "json" or not good:
        return _json(form, items, about, flat)
    arrays = stack(items, form.dtype)
    if form.kind == "npy":
        (array,) = arrays.values()
        return Response(npy_bytes(array), media_type=form.media_type)
    errors = {str(index): describe(item)[1] for index, item in enumerate(items) if isinstance(item, RequestError)}
    about = about | {"errors": json_bytes(errors).decode()}
    written = npz_bytes(arrays, about) if form.kind == "npz" else safetensors_bytes(arrays, about)
    return Response(written, media_type=form.media_type)


def stack(items: Sequence[Item], dtype: Floating) -> dict[str, NDArray[Any]]:
    """Arrays of all items, by name, (items, ...); NaN where an item failed."""
    first = next(item for item in items if not isinstance(item, RequestError))
    arrays = {}
    for name, like in first.items():
        array = np.full((len(items), *np.shape(like)), np.nan, dtype)
        for row, item in enumerate(items):
            if not isinstance(item, RequestError):
                array[row] = item[name]
        arrays[name] = array
    return arrays


def _json(form: Form, items: Sequence[Item], about: dict[str, str], flat: bool) -> Response:
    entries = [entry(item, form.dtype) for item in items]
    if flat:
        del entries[0]["status"]
        return json_response(entries[0] | about)
    data = [{"index": index, **each} for index, each in enumerate(entries)]
    if any(each["status"] == "ok" for each in entries):
        return json_response({"data": data} | about)
    error = RequestError(422, "no_good_image", f"none of the {len(items)} images can be used: see data.", "input")
    return json_response({"error": describe(error)[1], "data": data} | about, 422)


def entry(item: Item, dtype: Floating) -> dict[str, Any]:
    """One image in a JSON answer."""
    if isinstance(item, RequestError):
        return {"status": "error", "error": describe(item)[1]}
    return {"status": "ok"} | {name: _castable(value, dtype) for name, value in item.items()}


def _castable(value: Any, dtype: Floating) -> Any:
    """Arrays of floats in the type asked for; whatever else JSON can hold as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.ascontiguousarray(value, dtype)
    return value
