"""GIF (87a and 89a): the blocks before the first image. Pillow reads each in Python, and none after it."""

from __future__ import annotations

import struct

from mixmim_serve.containers.base import Header

MAX_BLOCKS = 65_536  # before the first image: written 2 to 10, and 16 MB of XMP or comments in blocks of 255 bytes

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B


def read(data: bytes, header: Header) -> None:
    """The size of the screen, enlarged by that of the first image as Pillow does."""
    header.kind = "lzw"
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    header.set_size(width, height)
    position, blocks = 13 + _palette_size(flags), 0
    while position < len(data):
        separator = data[position]
        blocks += 1
        header.at_most(MAX_BLOCKS, blocks, "blocks before its first image")
        if separator == _END:
            return
        if separator == _IMAGE:
            left, top, across, down = struct.unpack_from("<HHHH", data, position + 1)
            header.set_size(max(width, left + across), max(height, top + down))
            header.check_size("the first frame", across, down)
            return
        position += 1
        if separator != _EXTENSION:
            continue  # Pillow skips it as well
        position += 1  # the label
        while size := data[position]:
            position += size + 1
            blocks += 1
            header.at_most(MAX_BLOCKS, blocks, "blocks before its first image")
        position += 1


def _palette_size(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
