"""JPEG (ITU T.81): markers, segments and scans.

Pillow reads the segments before the first scan in Python, one object for each, and adds Exif segments to one another;
libjpeg then makes a pass over all pixels for each scan. Both read from marker to marker as this module does.
"""

from __future__ import annotations

import re
import struct

import numpy as np

from mixmim_serve.containers.base import MAX_EXIF, Header
from mixmim_serve.containers.exif import check_exif

MAX_SEGMENTS = 2_000  # cameras write 10 to 30; an ICC profile has at most 255, and 16 MB of metadata fill 245
MAX_JUNK = 65_536  # bytes between the segments before the first scan: cameras pad with a few, if at all
MAX_TABLES = 262_144  # bytes of tables and frame headers: 10 progressive scans have 1,500
MAX_RESOURCES = 4_096  # Photoshop's, of which it writes 20 to 60
MAX_EXIF_SEGMENTS = 16  # written: 1. Pillow adds them up, copying all earlier ones for each
MAX_SCANS = 64  # written: 1 to 10, by optimisers up to 20. Each is a pass over all pixels: 40 to 75 ms at 64 megapixels
SCAN = 0.12  # cost of one scan for each pixel of each full-size channel, on top of its bytes

_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # restart markers and stuffed bytes belong to the scan
_FIRST_WINDOW, _WINDOW = 1_024, 65_536  # bytes searched at a time: a scan may be short
_DENSE = 32  # more than one byte in so many is 0xFF: NumPy is faster than the expression (24 ns for each)

_EOI, _SOS, _APP1, _APP13 = 0xD9, 0xDA, 0xE1, 0xED
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # among C0 to CF, which start frames
_BARE = (*range(0xD0, 0xDA), *range(0xF0, 0xFE), 0xC8)  # without a length
_KINDS = {0xC2: "progressive", 0xC3: "lossless", **dict.fromkeys((0xC9, 0xCA, 0xCD, 0xCE), "arithmetic")}


def read(data: bytes, header: Header) -> None:
    """Walk from marker to marker, before, between and after the scans, to the end of the image."""
    header.kind = "baseline"
    position, scans, junk, tables, planes = 2, 0, 0, 0, 1.0
    metadata = _Metadata(data, header)
    while (at := _next_marker(data, position, scans, MAX_JUNK - junk)) is not None:
        if not scans:
            junk += at - position
            header.at_most(MAX_JUNK, junk, "bytes between its segments")
        marker, position = data[at + 1], at + 2
        if marker < 0xC0 or (marker == _EOI and scans):
            break  # unknown to both readers, or the end
        header.parts += 1
        header.at_most(MAX_SEGMENTS, header.parts, "segments")
        if marker in _BARE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        body, position = position + 2, position + max(2, length)
        if marker == _SOS:
            scans += 1
            header.at_most(MAX_SCANS, scans, "scans")
        elif marker >= 0xE0:
            metadata.add(marker, body, position)
        else:
            tables += length
            header.at_most(MAX_TABLES, tables, "bytes of tables")
            if marker < 0xD0 and marker not in _NO_FRAME and not scans:
                planes = _read_frame(data, body, marker, header)
    metadata.check_exif()
    if header.kind != "baseline" or scans > 1:
        header.extra_cost = header.width * header.height * planes * scans * SCAN


def _read_frame(data: bytes, body: int, marker: int, header: Header) -> float:
    """Take the size from a frame header; return how many full-size channels its coefficients fill."""
    height, width, channels = struct.unpack_from(">xHHB", data, body)
    header.set_size(width, height)
    header.kind = _KINDS.get(marker, "baseline")
    header.pixel_factor = 4.0 if channels == 4 else 1.0  # Pillow's conversion from CMYK
    factors = [(byte >> 4, byte & 15) for byte in data[body + 7 : body + 7 + 3 * min(channels, 4) : 3]]
    largest = max((across for across, _ in factors), default=1) * max((down for _, down in factors), default=1)
    return sum(across * down for across, down in factors) / max(1, largest)


class _Metadata:
    """The application segments: counted, and the Exif block put together as Pillow does."""

    def __init__(self, data: bytes, header: Header) -> None:
        self.data, self.header = data, header
        self.resources = 0
        self.exif: list[bytes] = []

    def add(self, marker: int, start: int, end: int) -> None:
        """Count the segment whose payload lies between two offsets."""
        self.header.add_metadata(end - start)
        if marker == _APP13:
            self.resources += self.data.count(b"8BIM", start, end)
            self.header.at_most(MAX_RESOURCES, self.resources, "Photoshop resources")
        elif marker == _APP1 and self.data.startswith(b"Exif\0\0", start):
            self.exif.append(self.data[start + 6 : end])
            self.header.at_most(MAX_EXIF_SEGMENTS, len(self.exif), "Exif segments")

    def check_exif(self) -> None:
        """Check the directories of the Exif block."""
        if self.exif:
            self.header.at_most(MAX_EXIF, sum(map(len, self.exif)), "bytes of Exif data")
            check_exif(b"".join(self.exif), self.header)


def _next_marker(data: bytes, position: int, scans: int, max_junk: int) -> int | None:
    """The offset of the next marker's 0xFF, or None; before the first scan no further away than the junk allowed."""
    if scans:
        return _end_of_scan(data, position)
    if data[position : position + 1] == b"\xff" and 0 < data[position + 1] < 0xFF:
        return position
    limit = position + max_junk + 2
    found = _MARKER.search(data, position, limit)
    return found.start() if found else limit if limit < len(data) - 1 else None


def _end_of_scan(data: bytes, position: int) -> int | None:
    """The offset of the first marker that is not part of entropy-coded data, in one fast pass."""
    size = _FIRST_WINDOW
    while position < len(data) - 1:
        end = min(position + size + 1, len(data))  # one byte more, for the code of a marker at its end
        if size > _FIRST_WINDOW and data.count(b"\xff", position, end) * _DENSE > size:
            found = _search_dense(data, position, end)
        else:
            match = _AFTER_SCAN.search(data, position, end)
            found = match.start() if match else None
        if found is not None:
            return found
        position, size = position + size, min(4 * size, _WINDOW)
    return None


def _search_dense(data: bytes, start: int, end: int) -> int | None:
    """As the expression, at the same speed whatever the bytes are."""
    window = np.frombuffer(data, np.uint8, end - start, start)
    first, second = window[:-1] == 0xFF, window[1:]
    ends = first & (second != 0xFF) & (second != 0) & (second & 0xF8 != 0xD0)
    return start + int(ends.argmax()) if ends.any() else None
