"""AVIF (ISO/IEC 23000-22): boxes of items and of tracks, and the sizes in the AV1 data they point to.

libavif looks through all items for each it reads (60,000 took 6 s), makes an object of each extent, even one of no
bytes (12 kB took 2 GB), and decodes an AV1 frame at its own size, whatever the boxes say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from mixmim_serve.containers.av1 import sequence_sizes
from mixmim_serve.containers.base import Header
from mixmim_serve.containers.exif import check_exif

MAX_BOXES = 16_384  # and AV1 units: written 15 to 50, and 2 to 4 for each tile of a grid
MAX_ENTRIES = 8_192  # in the tables of items: 4 to 10, and 4 for each tile of a grid; 12 megapixels have 48 tiles
MAX_EXTENTS = 16_384  # written: one for each item
MAX_SAMPLES = 65_536  # frames of a sequence, which libavif lists: 36 minutes at 30 a second
MAX_SHARED = 4_000_000  # bytes that items of one file may count again: encoders store equal tiles once
_MAX_DEPTH = 8  # boxes in boxes

# Boxes that hold boxes, and how many bytes stand before those
_PARENTS = {
    b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4,
    b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0,
}  # fmt: skip
_SAMPLE_TABLES = {b"stsz": 8, b"stts": 4, b"stsc": 4, b"stco": 4, b"co64": 4, b"stss": 4}  # where each counts its rows


class Item(NamedTuple):
    """Where the bytes of an item lie."""

    number: int
    in_idat: bool  # counted from the content of the idat box instead of from the start of the file
    extents: list[tuple[int, int]]  # offset, length


def read(data: bytes, header: Header) -> None:
    """Walk over the boxes, then over the AV1 units that they point to."""
    header.kind = "av1"
    boxes = _Boxes(data, header)
    try:
        for name, parent, start, end in boxes.walk(0, len(data)):
            boxes.read(name, parent, start, end)
    finally:  # of a file that ends early, what there is
        header.set_size(*boxes.size())
    for item in boxes.items:
        boxes.read_item(item)
    for start, size in zip(boxes.chunks, boxes.samples, strict=False):
        boxes.read_units(data, start, start + size)


class _Boxes:
    """What the boxes say, as far as it is needed."""

    def __init__(self, data: bytes, header: Header) -> None:
        self.data, self.header = data, header
        self.items: list[Item] = []
        self.exif: set[int] = set()  # numbers of items
        self.sizes: list[tuple[int, int]] = []  # of the properties in their order; (0, 0) for those of another kind
        self.associations: dict[int, bytes] = {}  # property numbers of items, in one byte each
        self.primary = self.idat = self.boxes = self.entries = self.extents = 0
        self.track_size = (0, 0)
        self.chunks: list[int] = []  # of each track the offset of its first chunk,
        self.samples: list[int] = []  # and the size of its first sample

    def walk(
        self, start: int, end: int, parent: bytes = b"", depth: int = 0
    ) -> Iterator[tuple[bytes, bytes, int, int]]:
        """Every box as (name, name of its parent, start and end of its content), parents before what they hold."""
        while start + 8 <= end:
            size, name = struct.unpack_from(">I4s", self.data, start)
            content = start + 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", self.data, content)
                content += 8
            stop = min(end, start + size) if size else end
            if stop < content:
                return
            self.count_box()
            yield name, parent, content, stop
            if name in _PARENTS and depth < _MAX_DEPTH:
                wide = name == b"iinf" and self.data[content] > 0
                yield from self.walk(content + _PARENTS[name] + 2 * wide, stop, name, depth + 1)
            start = stop

    def count_box(self) -> None:
        """Count a box or unit."""
        self.boxes += 1
        self.header.at_most(MAX_BOXES, self.boxes, "boxes")

    def add_entries(self, count: int) -> None:
        """Count rows of the tables of items."""
        self.entries += count
        self.header.at_most(MAX_ENTRIES, self.entries, "entries in its tables of items")

    def unpack(self, code: str, at: int) -> tuple[int, ...]:
        """Big-endian numbers at an offset."""
        return struct.unpack_from(f">{code}", self.data, at)

    def read(self, name: bytes, parent: bytes, start: int, end: int) -> None:
        """Take from one box what is needed."""
        if parent == b"ipco":
            self.read_property(name, start)
        elif parent == b"iref":
            self.add_entries(1 + (end - start) // 2)
        elif name in _SAMPLE_TABLES:
            self.read_samples(name, start)
        elif name == b"infe":
            self.read_item_type(start)
        elif name == b"iloc":
            self.read_locations(start)
        elif name == b"ipma":
            self.read_associations(start)
        elif name == b"pitm" and not self.primary:
            (self.primary,) = self.unpack("I" if self.data[start] else "H", start + 4)
        elif name == b"idat" and not self.idat:
            self.idat = start
        elif name == b"stsd" and self.data[start + 12 : start + 16] == b"av01":
            self.track_size = self.unpack("2H", start + 40)[:2]  # type: ignore[assignment]

    def read_property(self, name: bytes, start: int) -> None:
        """The size of an item, if the property is one."""
        width, height = self.unpack("2I", start + 4) if name == b"ispe" else (0, 0)
        self.header.check_size("the image", width, height)
        self.sizes.append((width, height))

    def read_samples(self, name: bytes, start: int) -> None:
        """Count the rows of a table of a track; where its first sample lies."""
        at = start + _SAMPLE_TABLES[name]
        (count,) = self.unpack("I", at)
        self.header.at_most(MAX_SAMPLES, count, "frames")
        if name == b"stsz":
            self.header.frames = max(self.header.frames, count)
            (same,) = self.unpack("I", at - 4)
            self.samples.append(same or self.unpack("I", at + 4)[0])
        elif name in (b"stco", b"co64") and count:
            self.chunks += self.unpack("I" if name == b"stco" else "Q", at + 4)

    def read_item_type(self, start: int) -> None:
        """Remember the items that hold Exif data."""
        self.add_entries(1)
        number, kind = struct.unpack_from(">H2x4s" if self.data[start] < 3 else ">I2x4s", self.data, start + 4)
        if kind == b"Exif":
            self.exif.add(number)

    def read_locations(self, start: int) -> None:
        """Where the items lie: a table of tables of extents."""
        version, sizes, more = self.data[start], self.data[start + 4], self.data[start + 5]
        offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, version and more & 15
        number = ">I" if version >= 2 else ">H"
        (count,) = struct.unpack_from(number, self.data, start + 6)
        at = start + 6 + struct.calcsize(number)
        self.add_entries(count)
        for _ in range(count):
            (item,) = struct.unpack_from(number, self.data, at)
            at += struct.calcsize(number)
            in_idat = bool(version and self.data[at + 1] & 15 == 1)
            at += 4 if version else 2
            base, at = self.number(at, base_size)
            (extents,) = self.unpack("H", at)
            at += 2
            self.extents += extents
            self.header.at_most(MAX_EXTENTS, self.extents, "pieces of items")
            places = []
            for _ in range(extents):
                offset, at = self.number(at + index_size, offset_size)
                length, at = self.number(at, length_size)
                places.append((base + offset, length))
            self.items.append(Item(item, in_idat, places))

    def number(self, at: int, size: int) -> tuple[int, int]:
        """An integer of `size` bytes, and the offset behind it."""
        return int.from_bytes(self.data[at : at + size], "big"), at + size

    def read_associations(self, start: int) -> None:
        """Which properties belong to which item."""
        wide_items, wide_numbers = self.data[start] > 0, self.data[start + 3] & 1
        (count,) = self.unpack("I", start + 4)
        self.add_entries(count)
        at = start + 8
        for _ in range(count):
            item, properties = struct.unpack_from(">IB" if wide_items else ">HB", self.data, at)
            at += 5 if wide_items else 3
            end = at + properties * (1 + wide_numbers)
            self.associations.setdefault(item, self.data[at + wide_numbers : end : 1 + wide_numbers])
            at = end

    def size(self) -> tuple[int, int]:
        """The size of the track of a sequence, else of the primary item, else the first there is."""
        if self.data[8:12] == b"avis" and any(self.track_size):
            return self.track_size
        numbers = [(byte & 0x7F) - 1 for byte in self.associations.get(self.primary, b"")]
        found = [self.sizes[number] for number in numbers if 0 <= number < len(self.sizes)]
        return next((size for size in [*found, *self.sizes, self.track_size] if any(size)), (0, 0))

    def read_item(self, item: Item) -> None:
        """Check what an item holds: Exif data, or AV1 units."""
        base, end = self.idat if item.in_idat else 0, len(self.data)
        places = [(base + offset, min(end, base + offset + (length or end))) for offset, length in item.extents]
        self.header.coded_bytes += sum(max(0, stop - start) for start, stop in places)
        self.header.at_most(4 * end + MAX_SHARED, self.header.coded_bytes, "bytes in items that overlap")
        if item.number in self.exif:
            block = b"".join(self.data[start:stop] for start, stop in places)
            self.header.add_metadata(len(block))
            check_exif(block[4:], self.header)  # behind the offset of its header, which is 0 or that of "Exif"
        elif len(places) == 1:
            self.read_units(self.data, *places[0])
        else:
            block = b"".join(self.data[start:stop] for start, stop in places)
            self.read_units(block, 0, len(block))

    def read_units(self, data: bytes, start: int, end: int) -> None:
        """Check the frame sizes that AV1 sequence headers announce."""
        for size in sequence_sizes(data, start, min(end, len(data))):
            self.count_box()
            if size is not None:
                self.header.check_size("a frame of the image", *size)
