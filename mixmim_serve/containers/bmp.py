"""BMP (Windows 2 to 5, OS/2): a header and pixels, which may be run-length encoded."""

from __future__ import annotations

import struct

from mixmim_serve.containers.base import Header

_CORE_HEADER = 12  # bytes, of Windows 2 and OS/2 1, with 16-bit sizes
_RUN_LENGTH = (1, 2)  # compressions


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
