"""BMP (Windows 2 to 5, OS/2): a header and pixels, which may be run-length encoded."""

from __future__ import annotations

import struct

from mixmim_serve.containers.base import Header, check_pixels

_CORE_HEADER = 12  # bytes, of Windows 2 and OS/2 1, with 16-bit sizes
_RUN_LENGTH = (1, 2)  # compressions
MAX_RUN_LENGTH_PIXELS = 16_000_000  # Pillow decodes these in Python, 0.1 us each; the largest screens have 8.3 million


def read(data: bytes, header: Header) -> None:
    """The size; a negative height stores the rows from top to bottom."""
    (size,) = struct.unpack_from("<I", data, 14)
    if size == _CORE_HEADER:
        width, height = struct.unpack_from("<HH", data, 18)
        compression = 0
    else:
        width, height, compression = struct.unpack_from("<II4xI", data, 18)
        if data[25] == 0xFF:  # how Pillow recognises a negative one
            height = 2**32 - height
    header.kind = "rle" if compression in _RUN_LENGTH else "raw"
    header.set_size(width, height)
    if header.kind == "rle":
        check_pixels("the run-length encoded BMP image", width, height, MAX_RUN_LENGTH_PIXELS)
