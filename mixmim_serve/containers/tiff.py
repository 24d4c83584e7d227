"""TIFF (classic and BigTIFF): a chain of directories, each of an image in strips or tiles.

Pillow makes an object of each number in the first directory, and of each strip or tile that is not compressed; libtiff
decodes the others. Later directories are never read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from mixmim_serve.containers.base import ENDS_EARLY, Header
from mixmim_serve.containers.exif import Directories, Entry, check_nested
from mixmim_serve.containers.jpeg import SCAN
from mixmim_serve.errors import UndecodableImageError

MAX_NUMBERS = 300_000  # in one tag; Pillow makes an object of each: 20 MB of offsets took 1.2 GB and 20 s
MAX_PARTS = 65_536  # strips or tiles, 40 us each: written 1 to 5,000; strips of one row cannot be more in one plane
MAX_PAGES = 1_000  # counted; a longer chain is not followed
_MAX_SCANS = 100  # of a JPEG strip: libtiff's own limit
_SPARE_PARTS = 16  # beyond twice the strips that the image needs
_MAX_PIECES = 8  # in which an uncompressed strip is read; written: 1

_KINDS = {
    1: "raw", 2: "fax", 3: "fax", 4: "fax", 5: "lzw", 6: "jpeg", 7: "jpeg", 8: "deflate", 32771: "raw",
    32773: "packbits", 32946: "deflate", 34925: "lzma", 50000: "zstd", 50001: "webp",
}  # fmt: skip
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION = 256, 257, 258, 259, 274
_STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_SEVERAL_SCANS = (b"\xff\xc2", b"\xff\xda\0\x08\x01", b"\xff\xda\0\x0a\x02")  # progressive; scans of 1 and 2 channels


def read(data: bytes, header: Header) -> None:
    """Read the first directory and those it points to; count the others."""
    directories = Directories(data)
    offset = directories.first()
    entries = directories.read(offset, header)
    for entry in entries.values():
        if entry.numbers > MAX_NUMBERS:
            raise UndecodableImageError(f"the TIFF image has a tag of {entry.length:,} numbers: save it again.")
    _read_image(data, directories, entries, header)
    check_nested(directories, entries, header)
    header.frames = _count_pages(directories, offset)


def _read_image(data: bytes, directories: Directories, entries: dict[int, Entry], header: Header) -> None:
    def value(tag: int, default: int = 1) -> int:
        return directories.value(entries, tag, default)

    width, height = value(_WIDTH, 0), value(_HEIGHT, 0)
    swapped = value(_ORIENTATION) in (5, 6, 7, 8)
    header.set_size(*((height, width) if swapped else (width, height)))
    header.kind = _KINDS.get(value(_COMPRESSION), "other")
    samples, bits = min(max(1, value(_SAMPLES)), 6), value(_BITS)
    header.pixel_factor = max(1.0, samples * bits / 24, 4.0 * (bits >= 32))  # numbers are stretched over their range
    across, down = value(_TILE_WIDTH), value(_TILE_HEIGHT)
    header.check_size("a tile of the image", across, down)  # libtiff decodes complete tiles
    sizes = (directories.values(entries.get(tag), MAX_PARTS) for tag in (_STRIP_BYTES, _TILE_BYTES))
    header.coded_bytes = max(sum(min(size, len(data)) for size in part_sizes) for part_sizes in sizes)
    header.parts = max(entries[tag].length if tag in entries else 0 for tag in (_STRIP_OFFSETS, _TILE_OFFSETS))
    header.at_most(MAX_PARTS, header.parts, "strips or tiles")
    if header.kind == "jpeg" and any(start in data for start in _SEVERAL_SCANS):
        header.extra_cost = 3 * SCAN * width * height * min(_MAX_SCANS, data.count(b"\xff\xda"))
    if header.kind == "raw" and header.parts > 1:
        if _STRIP_OFFSETS in entries:  # which Pillow prefers
            across, down = width, min(value(_ROWS, height), height)
        offsets = directories.values(entries.get(_STRIP_OFFSETS, entries.get(_TILE_OFFSETS)), MAX_PARTS)
        planes = samples if value(_PLANAR) == 2 else 1
        _check_parts(offsets, _Grid(width, height, max(1, across), max(1, down), planes, samples * bits), header)


class _Grid(NamedTuple):
    """How strips or tiles of (across, down) pixels cover an image."""

    width: int
    height: int
    across: int
    down: int
    planes: int
    bits: int  # of a pixel

    @property
    def columns(self) -> int:
        """Parts beside each other."""
        return -(-self.width // self.across)

    @property
    def rows(self) -> int:
        """Parts above each other."""
        return -(-self.height // self.down)

    def part_bytes(self, index: int) -> int:
        """What Pillow needs for one part: those at the lower edge are shorter."""
        row = index // self.columns % max(1, self.rows)
        return min(self.down, self.height - row * self.down) * self.across * self.bits // (8 * self.planes)


def _check_parts(offsets: Sequence[int], grid: _Grid, header: Header) -> None:
    """Refuse uncompressed strips that cover the image again and again, or that Pillow would read in small pieces.

    It reads to where the next one begins and appends that to what it has: 20 MB in two strips that begin one byte apart
    took 10 s.
    """
    needed = grid.columns * grid.rows * grid.planes
    if needed == grid.planes:
        return  # of an image in one part Pillow reads the last one alone
    header.at_most(2 * needed + _SPARE_PARTS, len(offsets), "strips or tiles, more than cover it")
    ordered = sorted((offset, grid.part_bytes(index)) for index, offset in enumerate(offsets))
    for (offset, size), (following, _) in itertools.pairwise(ordered):
        if 0 < _MAX_PIECES * (following - offset) < size:
            raise UndecodableImageError("the TIFF image has strips or tiles that overlap: save it again.")


def _count_pages(directories: Directories, offset: int) -> int:
    """The length of the chain of directories, which may lead in a circle."""
    seen: set[int] = set()
    with contextlib.suppress(*ENDS_EARLY):
        while offset and offset not in seen and len(seen) < MAX_PAGES:
            seen.add(offset)
            offset = directories.next(offset)
    return len(seen)
