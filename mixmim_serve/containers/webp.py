"""WebP (RFC 9649): one image in a VP8 or VP8L chunk, or VP8X with a canvas, frames and metadata."""

from __future__ import annotations

import struct

from mixmim_serve.containers.base import Header
from mixmim_serve.containers.exif import check_exif

MAX_CHUNKS = 16_384  # written: 1 to 5, and one for each frame; 20 MB hold 15 minutes at 10 frames a second

_VP8_START = b"\x9d\x01\x2a"


def read(data: bytes, header: Header) -> None:
    """Walk over the chunks; the size is that of the canvas, or of the image without one."""
    position, chunks, frames = 12, 0, 0
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        start, position = position + 8, position + 8 + length + (length & 1)
        chunks += 1
        header.at_most(MAX_CHUNKS, chunks, "chunks")
        if name == b"VP8X":
            header.set_size(_u24(data, start + 4) + 1, _u24(data, start + 7) + 1)
        elif name == b"ANMF":
            frames += 1
            header.frames = frames
            if frames == 1:
                _read_frame(data, start, start + length, header)
        elif name == b"EXIF":
            check_exif(data[start : start + length], header)
        elif name in (b"VP8 ", b"VP8L"):
            _read_image(data, name, start, header)


def _read_frame(data: bytes, start: int, end: int, header: Header) -> None:
    """The chunks within the first frame: an image, perhaps alpha before it."""
    position = start + 16
    while position + 8 <= min(end, len(data)) and not header.kind:
        name, length = struct.unpack_from("<4sI", data, position)
        _read_image(data, name, position + 8, header)
        position += 8 + length + (length & 1)
        header.parts += 1
        header.at_most(MAX_CHUNKS, header.parts, "chunks")


def _read_image(data: bytes, name: bytes, start: int, header: Header) -> None:
    """The size in the header of the image itself."""
    if name == b"VP8 " and data[start + 3 : start + 6] == _VP8_START:
        width, height = struct.unpack_from("<HH", data, start + 6)
        kind, width, height = "lossy", width & 0x3FFF, height & 0x3FFF
    elif name == b"VP8L" and data[start : start + 1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, start + 1)
        kind, width, height = "lossless", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        return
    header.kind = header.kind or kind
    if header.width:
        header.check_size("the image", width, height)
    else:
        header.set_size(width, height)


def _u24(data: bytes, at: int) -> int:
    low, high = struct.unpack_from("<HB", data, at)
    return int(low | high << 16)
