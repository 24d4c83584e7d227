"""TIFF (classic and BigTIFF): a chain of directories, each of an image in strips or tiles.

Pillow makes an object of each number in the first directory, and of each strip or tile that is not compressed; libtiff
decodes the others. Later directories are never read.
"""

from __future__ import annotations

import contextlib

from mixmim_serve.containers.base import ENDS_EARLY, Header
from mixmim_serve.containers.exif import Directories, Entry, check_nested
from mixmim_serve.errors import UndecodableImageError

MAX_NUMBERS = 300_000  # in one tag; Pillow makes an object of each: 20 MB of offsets took 1.2 GB and 20 s
MAX_PARTS = 65_536  # strips or tiles, 40 us each: written 1 to 5,000; strips of one row cannot be more in one plane
MAX_PAGES = 1_000  # counted; a longer chain is not followed
_MAX_SCANS = 100  # of a JPEG strip: libtiff's own limit
_SPARE_PARTS = 16  # beyond twice the strips that the image needs

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
    samples = min(max(1, value(_SAMPLES)), 6)
    header.pixel_factor = max(1.0, samples * value(_BITS) / 24)
    across, down = value(_TILE_WIDTH, 1), value(_TILE_HEIGHT, 1)
    header.check_size("a tile of the image", across, down)  # libtiff decodes complete tiles
    parts = {tag: entries[tag].length for tag in (_STRIP_OFFSETS, _TILE_OFFSETS) if tag in entries}
    header.parts = max(parts.values(), default=0)
    header.at_most(MAX_PARTS, header.parts, "strips or tiles")
    planes = samples if value(_PLANAR) == 2 else 1
    if _STRIP_OFFSETS in parts:  # which Pillow prefers
        across, down = width, min(value(_ROWS, height), height)
    needed = -(-width // max(1, across)) * -(-height // max(1, down)) * planes
    if header.kind == "raw" and needed > planes:  # of an image in one part Pillow reads the last one alone
        header.at_most(2 * needed + _SPARE_PARTS, header.parts, "strips or tiles, more than cover it")
    sizes = (directories.values(entries.get(tag), MAX_PARTS) for tag in (_STRIP_BYTES, _TILE_BYTES))
    header.coded_bytes = max(map(sum, sizes))
    if header.kind == "jpeg" and any(start in data for start in _SEVERAL_SCANS):
        header.pixel_factor *= min(_MAX_SCANS, max(1, data.count(b"\xff\xda")))


def _count_pages(directories: Directories, offset: int) -> int:
    """The length of the chain of directories, which may lead in a circle."""
    seen: set[int] = set()
    with contextlib.suppress(*ENDS_EARLY):
        while offset and offset not in seen and len(seen) < MAX_PAGES:
            seen.add(offset)
            offset = directories.next(offset)
    return len(seen)
