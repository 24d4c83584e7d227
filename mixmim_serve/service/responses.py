"""Response formats: what the client accepts, and how results are written in it.

JSON is for people and small results. The binary formats (npy, npz, safetensors) hold one row per image; a row of NaN is
an image that could not be read, and `errors` says why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save
from starlette.requests import Request
from starlette.responses import Response

from mixmim_serve.errors import NotFiniteError, quoted
from mixmim_serve.service.errors import RequestError, describe_error, image_refused
from mixmim_serve.service.options import DTYPE

JSON = "application/json"
MEDIA_TYPES = {
    JSON: "json",
    "application/x-npy": "npy",
    "application/x-npz": "npz",
    "application/x-safetensors": "safetensors",
    "application/safetensors": "safetensors",
    "image/png": "png",
}
CANONICAL = {kind: media for media, kind in reversed(MEDIA_TYPES.items())}  # the first media type of each kind
PIECE = 2048  # numbers of an array that are written at once: about a quarter of a millisecond
FloatType = type[np.float32] | type[np.float16]
FLOAT_TYPES: dict[str, FloatType] = {"float32": np.float32, "float16": np.float16}

ImageResult = Mapping[str, Any] | RequestError  # of one image: values by name, or why there are none


@dataclass(frozen=True)
class ResponseFormat:
    """The kind of a response, and the type of the floats in it."""

    kind: str
    dtype: FloatType = np.float32

    @property
    def media_type(self) -> str:
        """The content type."""
        return CANONICAL[self.kind]


def negotiate(request: Request, *kinds: str) -> ResponseFormat:
    """The format that Accept and `dtype` ask for, among the kinds that a route can write; the first is the default.

    Raises:
        RequestError: 406 when Accept names none of them, 400 for another dtype.
    """
    dtype = FLOAT_TYPES[DTYPE.read(request)]
    accepted = request.headers.get("accept", "*/*").lower()
    for entry in accepted.split(","):
        media = entry.partition(";")[0].strip()
        if media in ("", "*/*", f"{CANONICAL[kinds[0]].partition('/')[0]}/*"):
            return ResponseFormat(kinds[0], dtype)
        if MEDIA_TYPES.get(media) in kinds:
            return ResponseFormat(MEDIA_TYPES[media], dtype)
    available = ", ".join(CANONICAL[kind] for kind in kinds)
    raise RequestError(406, "not_acceptable", f"cannot answer as {quoted(accepted)}: accept {available}.")


def write(format_: ResponseFormat, results: Sequence[ImageResult], identity: dict[str, str], *, flat: bool) -> Response:
    """A response with one entry per image: 200 if any image is good, else 422. `flat` for an image that came alone.

    `cast_floats` has made the floats of all results finite, and of the format's type.

    Raises:
        RequestError: the error of an image that came alone.
    """
    if flat and isinstance(results[0], RequestError):
        raise results[0]
    good = [result for result in results if not isinstance(result, RequestError)]
    if format_.kind == "json" or not good:
        return _write_json(results, identity, flat)
    arrays = stack(results, format_.dtype)
    if format_.kind == "npy":
        (array,) = arrays.values()
        return Response(npy_bytes(array), media_type=format_.media_type)
    errors = {
        str(index): describe_error(result)[1]
        for index, result in enumerate(results)
        if isinstance(result, RequestError)
    }
    metadata = identity | {"errors": json_bytes(errors).decode()}
    to_bytes = npz_bytes if format_.kind == "npz" else safetensors_bytes
    return Response(to_bytes(arrays, metadata), media_type=format_.media_type)


def stack(results: Sequence[ImageResult], dtype: FloatType) -> dict[str, NDArray[Any]]:
    """Arrays of all images by name, (images, ...); NaN where an image failed."""
    first = next(result for result in results if not isinstance(result, RequestError))
    arrays = {}
    for name, like in first.items():
        array = np.full((len(results), *np.shape(like)), np.nan, dtype)
        for row, result in enumerate(results):
            if not isinstance(result, RequestError):
                array[row] = result[name]
        arrays[name] = array
    return arrays


def _write_json(results: Sequence[ImageResult], identity: dict[str, str], flat: bool) -> Response:
    entries = [json_entry(result) for result in results]
    if flat:
        del entries[0]["status"]
        return json_response(entries[0] | identity)
    data = [{"index": index, **entry} for index, entry in enumerate(entries)]
    if any(entry["status"] == "ok" for entry in entries):
        return Response(_with_data(data, identity), media_type=JSON)
    error = RequestError(422, "no_good_image", f"none of the {len(results)} images can be used: see data.", "input")
    return Response(_with_data(data, {"error": describe_error(error)[1]} | identity), 422, media_type=JSON)


def _with_data(data: Sequence[Mapping[str, Any]], rest: Mapping[str, Any]) -> bytes:
    """`data` and `rest` as one JSON object; one call per entry, because orjson lets no other thread run meanwhile."""
    return b'{"data":[' + b",".join(json_bytes(entry) for entry in data) + b"]," + json_bytes(rest)[1:]


def json_entry(result: ImageResult) -> dict[str, Any]:
    """One image in a JSON response."""
    if isinstance(result, RequestError):
        return {"status": "error", "error": describe_error(result)[1]}
    return {"status": "ok"} | dict(result)


def cast_floats(result: ImageResult, dtype: FloatType, param: str) -> ImageResult:
    """An image's arrays of floats as `dtype`, anything else unchanged; an error if one of them is not finite."""
    if isinstance(result, RequestError):
        return result
    with np.errstate(over="ignore"):
        cast = {name: _as(value, dtype) for name, value in result.items()}
    for name, value in cast.items():
        if isinstance(value, np.ndarray | np.floating) and not np.isfinite(value).all():
            return image_refused(_not_finite(name, result[name], dtype), param)
    return cast


def _as(value: Any, dtype: FloatType) -> Any:
    is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return np.ascontiguousarray(value, dtype) if is_float else value


def _not_finite(name: str, value: Any, dtype: FloatType) -> NotFiniteError:
    if dtype is np.float16 and np.isfinite(value).all():
        return NotFiniteError(f"{name} has values above 65,504, which float16 cannot hold: ask for dtype=float32.")
    return NotFiniteError(f"{name} of this image has inf or NaN: send another image.")


def json_bytes(value: Any) -> bytes:
    """JSON with arrays as lists, each number in its shortest exact form; 20 times as fast as `json`.

    Large arrays in an object are written piece by piece: orjson lets no other thread run meanwhile, and a feature map
    of a megabyte takes it 8 ms.
    """
    if isinstance(value, dict) and any(_is_large(entry) for entry in value.values()):
        return b"{" + b",".join(orjson.dumps(name) + b":" + _in_pieces(entry) for name, entry in value.items()) + b"}"
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _is_large(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.size > PIECE


def _in_pieces(value: Any) -> bytes:
    """The JSON of a value, of an array as many rows at a time as make about `PIECE` numbers."""
    if not _is_large(value):
        return json_bytes(value)
    rows = PIECE * len(value) // value.size
    if not rows:  # one alone is large
        return b"[" + b",".join(map(_in_pieces, value)) + b"]"
    pieces = []
    for begin in range(0, len(value), rows):
        pieces.append(json_bytes(value[begin : begin + rows])[1:-1])
        time.sleep(0)  # lets a thread that waits for the interpreter go on at once, not after the switch interval
    return b"[" + b",".join(pieces) + b"]"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(json_bytes(value), status, headers, JSON)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """One array as a .npy file."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Arrays as an .npz file, metadata as arrays of one string; uncompressed, since compression takes longer."""
    buffer = BytesIO()
    np.savez(buffer, **arrays, **{name: np.array(text) for name, text in metadata.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def safetensors_bytes(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Arrays as a .safetensors file with metadata."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(metadata))
