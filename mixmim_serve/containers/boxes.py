"""Boxes of the ISO base media file format (ISO/IEC 14496-12) and of image items (23008-12), as AVIF and HEIC have them.

Decoders look through all items for each that they read (60,000 took libavif 6 s), and make an object of each extent,
even of one of no bytes (12 kB took 2 GB).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from mixmim_serve.containers.base import Header
from mixmim_serve.containers.exif import check_exif

MAX_BOXES = 16_384  # and AV1 units: written 15 to 50, and 2 to 4 for each tile of a grid
MAX_ENTRIES = 8_192  # in the tables of items: 4 to 10, and 4 for each tile of a grid; 12 megapixels have 48 tiles
MAX_EXTENTS = 16_384  # written: one for each item
MAX_SAMPLES = 65_536  # frames of a sequence, which decoders list: 36 minutes at 30 a second
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


class Boxes:
    """What the boxes say, as far as every format needs it; a subclass reads its own properties, items and tracks."""

    def __init__(self, data: bytes, header: Header) -> None:
        self.data, self.header = data, header
        self.items: list[Item] = []
        self.kinds: dict[int, bytes] = {}  # of the items by number, such as "av01" or "Exif"
        self.sizes: list[tuple[int, int]] = []  # of the properties in their order; (0, 0) for those of another kind
        self.associations: dict[int, list[int]] = {}  # positions in `sizes` of the properties of each item
        self.primary = self.idat = self.boxes = self.entries = self.extents = 0
        self.wide_references = False
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
            self.read_property(name, start, end)
        elif parent == b"iref":
            self.add_entries(1 + (end - start) // 2)
            self.read_reference(name, start)
        elif name == b"iref":
            self.wide_references = self.data[start] > 0
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
        elif name == b"stsd":
            self.read_sample_description(start)

    def read_property(self, name: bytes, start: int, end: int) -> None:
        """The size of an item, if the property is one."""
        width, height = self.unpack("2I", start + 4) if name == b"ispe" else (0, 0)
        self.header.check_size("the image", width, height)
        self.sizes.append((width, height))

    def read_reference(self, kind: bytes, start: int) -> None:
        """A reference of one item to others; of interest to a subclass."""

    def read_sample_description(self, start: int) -> None:
        """The kind of a track; of interest to a subclass."""

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
        """What an item holds."""
        self.add_entries(1)
        number, kind = struct.unpack_from(">H2x4s" if self.data[start] < 3 else ">I2x4s", self.data, start + 4)
        self.kinds.setdefault(number, kind)

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
            self.add_entries(properties)
            at += 5 if wide_items else 3
            numbers = self.unpack(f"{properties}{'H' if wide_numbers else 'B'}", at)
            at += properties * (1 + wide_numbers)
            mask = 0x7FFF if wide_numbers else 0x7F  # the highest bit says whether a reader must know the property
            self.associations.setdefault(item, []).extend((number & mask) - 1 for number in numbers)

    def sizes_of(self, item: int) -> list[tuple[int, int]]:
        """The sizes among the properties of an item."""
        known = range(len(self.sizes))
        found = [self.sizes[number] for number in self.associations.get(item, []) if number in known]
        return [size for size in found if any(size)]

    def pieces(self, item: Item) -> list[tuple[int, int]]:
        """Start and end of the pieces of an item, within the file; the bytes are counted.

        Raises:
            UndecodableImageError: items share more bytes than any encoder makes them.
        """
        base, end = self.idat if item.in_idat else 0, len(self.data)
        places = [(base + offset, min(end, base + offset + (length or end))) for offset, length in item.extents]
        self.header.coded_bytes += sum(max(0, stop - start) for start, stop in places)
        self.header.at_most(4 * end + MAX_SHARED, self.header.coded_bytes, "bytes in items that overlap")
        return places

    def content(self, places: list[tuple[int, int]]) -> bytes:
        """The bytes of pieces."""
        return b"".join(self.data[start:stop] for start, stop in places)

    def check_exif(self, places: list[tuple[int, int]]) -> None:
        """Check an item that holds Exif data."""
        block = self.content(places)
        self.header.add_metadata(len(block))
        check_exif(block[4:], self.header)  # behind the offset of its header, which is 0 or that of "Exif"
