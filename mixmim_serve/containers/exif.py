"""Directories of tags, as TIFF files and Exif blocks hold them (TIFF 6.0, section 2; BigTIFF has wider fields)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mixmim_serve.containers.base import ENDS_EARLY, MAX_EXIF, Header

MAX_ENTRIES = 4_096  # in one directory: cameras write 20 to 100, raw converters up to 300
MAX_NUMBERS = 20_000  # in all tags of Exif directories: Pillow makes a fraction of each (2.3 us, 190 bytes)
_EXIF, _GPS, _INTEROPERABILITY = 34665, 34853, 40965
_BYTE_TYPES = (1, 2, 7)  # BYTE, ASCII, UNDEFINED: kept as one bytes object
_SIZES = {3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # bytes of a value of the other types
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q"}  # struct codes by TIFF type
_PREFIX = re.compile(rb"(?:Exif\0\0){1,2}")


class Entry(NamedTuple):
    """One tag of a directory."""

    kind: int  # the TIFF type of its values
    length: int  # in values
    at: int  # offset of the field that holds the value, or the offset of the values

    @property
    def numbers(self) -> int:
        """How many objects a reader makes of its values."""
        return 1 if self.kind in _BYTE_TYPES else self.length

    def numbers_within(self, size: int) -> int:
        """The same, if Pillow reads it: it skips unknown types, and values that do not fit in `size` bytes."""
        return self.length if self.kind in _SIZES and self.length * _SIZES[self.kind] <= size else 0


class Directories:
    """Random access to the directories of one file or block."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:1] == b"I" else ">"
        self.big = b"+" in data[2:4]
        self.offset, self.count_field, self.entry = ("Q", "Q", "HHQQ") if self.big else ("I", "H", "HHII")
        self.entry_size = 20 if self.big else 12

    def first(self) -> int:
        """The offset of the first directory."""
        return self._unpack(self.offset, 8 if self.big else 4)

    def _unpack(self, code: str, at: int) -> int:
        return int(struct.unpack_from(self.order + code, self.data, at)[0])

    def length(self, offset: int) -> int:
        """How many entries the directory at an offset announces."""
        return self._unpack(self.count_field, offset)

    def read(self, offset: int, header: Header) -> dict[int, Entry]:
        """The entries by tag; of a tag that occurs twice the first, as in Pillow.

        Raises:
            UndecodableImageError: more than `MAX_ENTRIES`.
        """
        count = min(self.length(offset), (len(self.data) - offset) // self.entry_size)
        header.at_most(MAX_ENTRIES, count, "entries in a directory of tags")
        return dict(reversed(list(self._entries(offset, count))))

    def _entries(self, offset: int, count: int) -> Iterator[tuple[int, Entry]]:
        start = offset + struct.calcsize("=" + self.count_field)
        block = self.data[start : start + count * self.entry_size]
        block = block[: len(block) // self.entry_size * self.entry_size]
        at = start + self.entry_size - struct.calcsize("=" + self.offset)
        for tag, kind, values, _ in struct.iter_unpack(self.order + self.entry, block):
            yield tag, Entry(kind, values, at)
            at += self.entry_size

    def numbers(self, entries: dict[int, Entry]) -> int:
        """How many objects Pillow makes of all values."""
        return sum(entry.numbers_within(len(self.data)) for entry in entries.values())

    def next(self, offset: int) -> int:
        """The offset of the directory that follows the one at an offset; 0 for none."""
        after = offset + struct.calcsize("=" + self.count_field) + self.length(offset) * self.entry_size
        return self._unpack(self.offset, after)

    def values(self, entry: Entry | None, limit: int) -> tuple[int, ...]:
        """The first `limit` values of an entry of integers; none for other types and where the file ends."""
        if entry is None or entry.kind not in _INTEGERS:
            return ()
        code, count = _INTEGERS[entry.kind], min(entry.length, limit)
        size = struct.calcsize("=" + code)
        inline = entry.length * size <= struct.calcsize("=" + self.offset)
        at = entry.at if inline else self._unpack(self.offset, entry.at)
        count = min(count, max(0, len(self.data) - at) // size)
        return struct.unpack_from(f"{self.order}{count}{code}", self.data, at)

    def value(self, entries: dict[int, Entry], tag: int, default: int) -> int:
        """The first integer of a tag."""
        found = self.values(entries.get(tag), 1)
        return found[0] if found else default


def check_exif(block: bytes, header: Header) -> None:
    """Refuse an Exif block that is expensive to read; one that cannot be read is left to Pillow, which ignores it.

    Raises:
        UndecodableImageError: longer than `MAX_EXIF`, or more entries or numbers than its directories may have.
    """
    header.at_most(MAX_EXIF, len(block), "bytes of Exif data")
    prefix = _PREFIX.match(block)
    directories = Directories(block[prefix.end() :] if prefix else block)
    try:
        entries = directories.read(directories.first(), header)
        header.at_most(MAX_NUMBERS, directories.numbers(entries), "numbers in its Exif tags")
        check_nested(directories, entries, header)
    except ENDS_EARLY:
        return


def check_nested(directories: Directories, entries: dict[int, Entry], header: Header) -> None:
    """Check the directories of Exif, GPS and interoperability tags that others point to: Pillow reads all their tags.

    Raises:
        UndecodableImageError: more entries or numbers than they may have.
    """
    numbers = 0
    exif: dict[int, Entry] = {}
    for tag in (_EXIF, _GPS, _INTEROPERABILITY):
        holder = exif if tag == _INTEROPERABILITY else entries
        offset = directories.value(holder, tag, 0)
        if not offset:
            continue
        try:
            found = directories.read(offset, header)
        except ENDS_EARLY:
            continue
        if tag == _EXIF:
            exif = found
        numbers += directories.numbers(found)
        header.at_most(MAX_NUMBERS, numbers, "numbers in its Exif tags")
