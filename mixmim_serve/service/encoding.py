"""Arrays and JSON as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save
from starlette.responses import Response

JSON = "application/json"


def json_bytes(value: Any) -> bytes:
    """JSON with arrays as lists, each number in the fewest digits that give it back: 20 times as fast as `json`."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(json_bytes(value), status, headers, JSON)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """One array as a .npy file."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> bytes:
    """Arrays as an .npz file, with texts as arrays of one string; not compressed, which takes longer than it saves."""
    buffer = BytesIO()
    np.savez(buffer, **arrays, **{name: np.array(text) for name, text in about.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def safetensors_bytes(arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> bytes:
    """Arrays as a .safetensors file, with texts as its metadata."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(about))
