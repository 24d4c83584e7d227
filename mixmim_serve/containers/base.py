"""What every format shares: the result, the limits on size, and the cost of decoding."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from mixmim_serve.errors import ImageTooLargeError, UndecodableImageError

MAX_PIXELS = 64_000_000  # Pillow itself warns above 89 megapixels
MAX_SIDE = 65_535  # pixels: JPEG and GIF cannot hold more. It bounds the aspect, too: 1 x 64,000,000 is refused
MAX_METADATA = 16_000_000  # bytes of one file: a camera writes 10 to 60 kB, a portrait with its depth map 2 to 10 MB
MAX_EXIF = 1_000_000  # bytes of one file: a JPEG segment holds 65,533, and cameras write one


# What reading a field raises where a file ends early or points beyond its end
ENDS_EARLY = (struct.error, IndexError, OverflowError)


class Rate(NamedTuple):
    """The cost of one pixel, one byte of the file and one part (a segment, chunk or strip) of it."""

    pixel: float
    byte: float
    part: float = 0.0


# In pixels of an ordinary JPEG photo (baseline, 4:2:0, quality 85), which take 4 ns on a core of 2026: calibrated by
# benchmarks/containers.py, rounded up. Bytes matter as much as pixels: a noisy image takes several times as long as a
# blank one. The rate of a pixel is for three channels of 8 bits.
RATES = {
    "JPEG baseline": Rate(0.6, 2.5, 400),
    "JPEG progressive": Rate(0.9, 5.0, 400),  # and `jpeg.SCAN` for each scan and pixel
    "JPEG arithmetic": Rate(0.9, 12.0, 400),  # not measured: Pillow writes none. Three times as slow as Huffman coding
    "JPEG lossless": Rate(2.0, 3.0, 400),  # not measured: Pillow writes none
    "PNG sequential": Rate(2.5, 3.0, 700),
    "PNG interlaced": Rate(4.0, 3.0, 700),
    "WEBP lossy": Rate(5.0, 9.0),
    "WEBP lossless": Rate(5.0, 3.5),
    "GIF lzw": Rate(0.9, 2.0),
    "BMP raw": Rate(0.4, 0.0),
    "BMP rle": Rate(30.0, 60.0),  # decoded in Python
    "AVIF av1": Rate(3.0, 18.0),
    "HEIC hevc": Rate(4.0, 19.0),
    "TIFF raw": Rate(0.4, 0.1, 3_000),
    "TIFF packbits": Rate(0.4, 0.3, 2_000),
    "TIFF lzw": Rate(1.2, 2.0, 2_000),
    "TIFF deflate": Rate(1.2, 3.0, 2_000),
    "TIFF zstd": Rate(1.0, 1.0, 2_000),
    "TIFF lzma": Rate(3.0, 12.0, 40_000),
    "TIFF fax": Rate(2.5, 3.0, 2_000),
    "TIFF jpeg": Rate(0.9, 3.0, 10_000),
    "TIFF webp": Rate(5.0, 9.0, 10_000),
    "TIFF other": Rate(3.0, 12.0, 10_000),
}


@dataclass(frozen=True, slots=True)
class Container:
    """What the headers of a file say."""

    format: str  # of ACCEPTED_FORMATS
    width: int  # pixels, as Pillow will report them; 0 if the file ends before they are said
    height: int
    frames: int  # as declared; 1 for GIF, for HEIC and for WebP and AVIF stills. Only the first is decoded
    kind: str  # such as "progressive"; with the format a key of `RATES`
    decode_cost: float  # in pixels of an ordinary JPEG photo


@dataclass(slots=True)
class Header:
    """What has been read so far; each setter refuses what exceeds a limit."""

    format: str
    max_pixels: int
    width: int = 0
    height: int = 0
    frames: int = 1
    kind: str = ""
    parts: int = 0
    metadata: int = 0  # bytes
    pixel_factor: float = 1.0  # of the rate of a pixel: channels and depth
    extra_cost: float = 0.0
    coded_bytes: int = 0  # that the decoder reads, where that is more than the file holds
    _largest: int = field(default=0)  # pixels

    def set_size(self, width: int, height: int) -> None:
        """Take over the size of the image."""
        self.width, self.height = width, height
        self.check_size("the image", width, height)

    def check_size(self, what: str, width: int, height: int) -> None:
        """Refuse what has too many pixels or is too long; the cost is that of the largest size checked.

        Raises:
            ImageTooLargeError: it has or is.
        """
        check_pixels(what, width, height, self.max_pixels)
        if max(width, height) > MAX_SIDE:
            raise ImageTooLargeError(
                f"{what} has {width} x {height} pixels, the limit of a side is {MAX_SIDE:,}: send a smaller one."
            )
        self._largest = max(self._largest, width * height)

    def add_metadata(self, size: int) -> None:
        """Count bytes that belong to no pixel."""
        self.metadata += size
        if self.metadata > MAX_METADATA:
            raise ImageTooLargeError(
                f"the {self.format} image has more than {MAX_METADATA:,} bytes of metadata: save it without."
            )

    def at_most(self, limit: int, count: int, what: str) -> None:
        """Refuse a structure that no encoder writes.

        Raises:
            UndecodableImageError: there are more than `limit`.
        """
        if count > limit:
            raise UndecodableImageError(f"the {self.format} image has more than {limit:,} {what}: save it again.")

    def container(self, size: int) -> Container:
        """The result for a file of `size` bytes."""
        rate = RATES.get(f"{self.format} {self.kind}", Rate(1.0, 1.0))
        cost = self._largest * rate.pixel * self.pixel_factor + self.parts * rate.part + self.extra_cost
        cost += max(size, self.coded_bytes) * rate.byte
        return Container(self.format, self.width, self.height, self.frames, self.kind, cost)


def check_pixels(what: str, width: int, height: int, max_pixels: int) -> None:
    """Refuse what has too many pixels.

    Raises:
        ImageTooLargeError: it has.
    """
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{what} has {width} x {height} pixels, the limit is {max_pixels:,} in all: send a smaller one."
        )
