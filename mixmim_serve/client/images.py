"""Encode whatever the caller passes as an image to the bytes that are sent."""

from __future__ import annotations

import os
from io import BytesIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageOps

from mixmim_serve.errors import ImageError, UnsupportedImageError
from mixmim_serve.preprocess import read_limited

Image = bytes | bytearray | memoryview | str | os.PathLike[str] | PIL.Image.Image | NDArray[np.uint8]
"""An encoded image, the path of one, a Pillow image, or uint8 RGB (H, W, 3)."""

MAX_FILE_BYTES = 64 * 2**20  # the server may have a lower limit


def encoded(image: Image) -> bytes:
    """An image as encoded bytes: files and bytes unchanged, pixels as an upright PNG.

    Raises:
        ImageError: a file that cannot be read, or pixels that PNG cannot represent.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return read_limited(image, MAX_FILE_BYTES)
    if isinstance(image, np.ndarray):
        return _png(_from_array(image))
    if isinstance(image, PIL.Image.Image):
        return _png(image)
    kind = type(image).__name__
    raise UnsupportedImageError(f"an image must be bytes, a path, a Pillow image or a uint8 array, got {kind}.")


def _from_array(array: NDArray[np.uint8]) -> PIL.Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UnsupportedImageError(
            f"an array must be uint8 RGB of shape (H, W, 3), got {array.dtype} of shape {array.shape}."
        )
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _png(image: PIL.Image.Image) -> bytes:
    """Lossless and fast rather than small: zlib level 1."""
    buffer = BytesIO()
    try:
        ImageOps.exif_transpose(image).save(buffer, "PNG", compress_level=1)
    except Exception as error:  # a mode that PNG lacks, or a damaged file behind a lazily loaded image
        reason = str(error) or type(error).__name__
        raise ImageError(f"the Pillow image cannot be encoded as PNG ({reason}): convert it to RGB.") from error
    return buffer.getvalue()
