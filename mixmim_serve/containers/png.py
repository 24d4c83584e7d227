"""PNG and APNG (W3C PNG, third edition): chunks.

Pillow calls a Python function for each chunk, before and after the pixels, and inflates up to 1 MB of each compressed
text and of each colour profile, however many there are.
"""

from __future__ import annotations

import re
import struct

from mixmim_serve.containers.base import Header
from mixmim_serve.containers.exif import check_exif

MAX_CHUNKS = 16_384  # written: one for each 8 to 64 kB of pixels, by ffmpeg 4 kB, so 4,900 in 20 MB
MAX_COMPRESSED = 32  # colour profiles and compressed texts: 1 to 6 are written. 3 ms each at Pillow's limit of 1 MB

_NAME = re.compile(rb"\w{4}")  # Pillow stops at any other
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PIXELS = (b"IDAT", b"fdAT", b"DDAT")


def read(data: bytes, header: Header) -> None:
    """Walk over the chunks of the image, or of an animation up to its second frame."""
    position, compressed, frames_begun = 8, 0, 0
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        start, position = position + 8, position + 12 + length
        header.parts += 1
        header.at_most(MAX_CHUNKS, header.parts, "chunks")
        if name == b"IEND" or not _NAME.match(name):
            return
        if name in _PIXELS:
            continue
        header.add_metadata(min(length, len(data) - start))
        if name == b"IHDR":
            _read_size(data, start, header)
        elif name == b"acTL":
            header.frames = max(1, struct.unpack_from(">I", data, start)[0])
        elif name == b"fcTL":
            frames_begun += 1
            if frames_begun > 1 and header.frames > 1:
                return  # Pillow stops here, too
        elif name == b"eXIf":
            check_exif(data[start : start + length], header)
        elif _is_compressed(data, name, start):
            compressed += 1
            header.at_most(MAX_COMPRESSED, compressed, "compressed texts and colour profiles")


def _read_size(data: bytes, start: int, header: Header) -> None:
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, start)
    header.kind = "interlaced" if interlaced else "sequential"
    header.pixel_factor = max(0.5, _CHANNELS.get(colour, 4) * depth / 20)
    header.set_size(width, height)


def _is_compressed(data: bytes, name: bytes, start: int) -> bool:
    """Whether Pillow inflates the chunk; iTXt says so behind its keyword of at most 79 bytes."""
    if name == b"iTXt":
        end = data.find(b"\0", start, start + 80)
        return end < 0 or data[end + 1 : end + 2] != b"\0"
    return name in (b"zTXt", b"iCCP")
