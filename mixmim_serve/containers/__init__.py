"""A linear look at an image file before a decoder sees it: its size, its limits and what decoding it will cost.

    inspect(data)      -> Container      format, width, height, frames, kind and cost, or an `ImageError`
    decode_cost(data)  -> float          of that the cost alone, in pixels of an ordinary JPEG photo

Each format has one module that walks segment or chunk headers and jumps over what they announce. No walk is longer than
its limits or than one pass over the bytes (20 MB in less than 0.1 s), and none allocates with a count from the file.
The limits are far above what encoders write, and each stands beside the number of a legitimate file. A file that is
truncated or damaged is not refused here, but for HEIC: its decoder does that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from mixmim_serve import heif
from mixmim_serve.containers import avif, bmp, gif, heic, jpeg, png, tiff, webp
from mixmim_serve.containers.base import ENDS_EARLY, MAX_PIXELS, MAX_SIDE, Container, Header
from mixmim_serve.errors import UndecodableImageError, UnsupportedImageError

__all__ = [
    "ACCEPTED",
    "ACCEPTED_FORMATS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "PILLOW_FORMATS",
    "Container",
    "decode_cost",
    "identify",
    "inspect",
]

# Pillow's format name: the first bytes of its files. MPO (two JPEGs of a stereo camera) starts and opens as JPEG.
# HEIC shares AVIF's container; the brands at its start tell them apart. It needs the extra `heif`.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"(II|MM)([*+]\0|\0[*+])",
    "BMP": rb"BM",
    "AVIF": rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4}){0,16}?avi[fs])",
    "HEIC": rb".{4}ftyp(hei[cxms]|(mif1|msf1).{4}(.{4}){0,16}?hei[cxms])",
}
_PATTERNS = {name: re.compile(signature, re.DOTALL) for name, signature in _SIGNATURES.items()}
ACCEPTED_FORMATS = tuple(_SIGNATURES)
PILLOW_FORMATS = tuple(name for name in ACCEPTED_FORMATS if name != "HEIC")  # which Pillow reads without a plugin
ACCEPTED = f"{', '.join(ACCEPTED_FORMATS[:-1])} or {ACCEPTED_FORMATS[-1]}"

_READERS: dict[str, Callable[[bytes, Header], None]] = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WEBP": webp.read,
    "GIF": gif.read,
    "TIFF": tiff.read,
    "BMP": bmp.read,
    "AVIF": avif.read,
    "HEIC": heic.read,
}


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> Container:
    """What the container says, within its limits; width and height are 0 where the file ends before them.

    Raises:
        UnsupportedImageError: not an image of `ACCEPTED_FORMATS`, or of one whose package is not installed.
        ImageTooLargeError: more than `max_pixels`, `MAX_SIDE` or the limit of metadata bytes.
        UndecodableImageError: empty, or more scans, segments, chunks, strips or entries than their limit.
    """
    header = Header(identify(data), max_pixels)
    if header.format == "HEIC":
        heif.require()
    with contextlib.suppress(*ENDS_EARLY):  # what was read so far counts, and the decoder says that it is truncated
        _READERS[header.format](data, header)
    return header.container(len(data))


def decode_cost(data: bytes) -> float:
    """The work of decoding a file, in pixels of an ordinary JPEG photo; a good upper estimate, see `base.RATES`.

    Raises:
        ImageError: as `inspect`.
    """
    return inspect(data).decode_cost


def identify(data: bytes) -> str:
    """The format by the first bytes: one of `ACCEPTED_FORMATS`.

    Raises:
        UnsupportedImageError: none of them.
        UndecodableImageError: empty.
    """
    if not data:
        raise UndecodableImageError(f"the image is empty: send the bytes of a {ACCEPTED} file.")
    for name, pattern in _PATTERNS.items():
        if pattern.match(data):
            return name
    raise UnsupportedImageError(f"the data is not an image of an accepted format: send {ACCEPTED}.")
