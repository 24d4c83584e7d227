"""Image files that are small to send and costly to read, for `benchmarks/attacks.py`; they are made, not stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

FULL = 19_900_000  # bytes: just below what an image may have


def write_all(folder: Path) -> None:
    """Write each file into a folder, by its name in `FILES`."""
    for name, make in FILES.items():
        (folder / name).write_bytes(make())


def encoded(format_: str, size: tuple[int, int], **options: object) -> bytes:
    """A grey image in some format."""
    stream = io.BytesIO()
    Image.new("RGB", size, "grey").save(stream, format_, **options)
    return stream.getvalue()


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    jpeg = encoded("JPEG", (side, side), progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * (scans - jpeg.count(b"\xff\xda")) + jpeg[-2:]


def jpeg_of_segments(marker: int, payload: bytes) -> bytes:
    """A JPEG with as many segments of one kind before its pixels as fit."""
    jpeg = encoded("JPEG", (16, 16))
    segment = bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload
    return jpeg[:2] + segment * (FULL // len(segment)) + jpeg[2:]


def png_of_chunks() -> bytes:
    """A PNG with 1.6 million empty chunks before its pixels."""
    png = encoded("PNG", (16, 16))
    chunk = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    return png[:33] + chunk * (FULL // len(chunk)) + png[33:]


FILES: dict[str, Callable[[], bytes]] = {
    "photo": lambda: encoded("JPEG", (256, 192)),
    "large.webp": lambda: encoded("WEBP", (8000, 8000), lossless=True, quality=0, method=0),
    "medium.webp": lambda: encoded("WEBP", (1000, 1000), lossless=True, quality=0, method=0),
    "scans.jpg": lambda: jpeg_of_scans(8000, 480),
    "allowed_scans.jpg": lambda: jpeg_of_scans(4000, 60),
    "segments.jpg": lambda: jpeg_of_segments(0xE5, b""),
    "exif.jpg": lambda: jpeg_of_segments(0xE1, b"Exif\0\0II"),
    "chunks.png": png_of_chunks,
    "pixels.png": lambda: encoded("PNG", (8000, 8000)),
}
