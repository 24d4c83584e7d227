"""What the NAL units of an HEVC bitstream announce: picture sizes and slices (H.265, 7.3.1, 7.3.2.2 and 7.3.6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mixmim_serve.containers.bits import Bits

_LAST_SLICE_TYPE = 31
_SEQUENCE_PARAMETERS = 33
_HEADER_BYTES = 256  # of sequence parameters, up to the size: shorter, by far
_PROFILE_BITS = 88


class Unit(NamedTuple):
    """A NAL unit, as far as it matters here."""

    is_slice: bool
    begins_picture: bool
    size: tuple[int, int] | None  # of the pictures, from sequence parameters


def units(data: bytes, start: int, end: int) -> Iterator[Unit]:
    """The units between two offsets, each behind its length in four bytes, lazily."""
    end = min(end, len(data))
    while start + 4 < end:
        length = int.from_bytes(data[start : start + 4], "big")
        start += 4
        yield unit(data[start : min(end, start + min(length, _HEADER_BYTES))])
        start += length


def unit(head: bytes) -> Unit:
    """The unit that begins with these bytes."""
    kind = head[0] >> 1 & 63 if head else 0
    is_slice = kind <= _LAST_SLICE_TYPE and len(head) > 2
    size = _picture_size(head) if kind == _SEQUENCE_PARAMETERS else None
    return Unit(is_slice, is_slice and head[2] >> 7 == 1, size)


def _picture_size(head: bytes) -> tuple[int, int]:
    """Width and height that sequence parameters announce, in pixels, as they are coded: cropping is not applied."""
    bits = Bits(head[2:].replace(b"\0\0\3", b"\0\0"))  # behind the unit's header; the 3 only keeps zeros apart
    bits.read(4)
    layers = bits.read(3)
    bits.read(1)
    bits.read(_PROFILE_BITS + 8)
    present = [(bits.read(1), bits.read(1)) for _ in range(layers)]
    bits.read(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.read(_PROFILE_BITS * profile + 8 * level)
    bits.read_golomb()  # number of these parameters
    if bits.read_golomb() == 3:  # chroma 4:4:4
        bits.read(1)
    return bits.read_golomb(), bits.read_golomb()
