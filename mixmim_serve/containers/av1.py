"""The frame sizes that the sequence headers of an AV1 bitstream announce (AV1 specification, 5.3 and 5.5)."""

from __future__ import annotations

from collections.abc import Iterator

from mixmim_serve.containers.bits import Bits

_SEQUENCE_HEADER = 1
_HEADER_BYTES = 128  # a sequence header is shorter, by far


def sequence_sizes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int] | None]:
    """The maximum (width, height) of each unit that is a sequence header, None of each other unit, lazily."""
    while start < end:
        first = data[start]
        start += 2 if first & 0x04 else 1  # an extension byte follows
        if first & 0x02:
            size, start = _leb128(data, start)
            stop = min(end, start + size)
        else:
            stop = end
        is_header = first >> 3 & 15 == _SEQUENCE_HEADER
        yield _maximum_size(data[start : min(stop, start + _HEADER_BYTES)]) if is_header else None
        start = stop


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to 8 bytes, 7 bits in each; and the offset behind it."""
    value = 0
    for index in range(8):
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            break
    return value, at + index + 1


def _maximum_size(data: bytes) -> tuple[int, int]:
    bits = Bits(data)
    bits.read(4)  # profile, still picture
    if bits.read(1):  # reduced header of a still picture
        bits.read(5)
    else:
        _skip_operating_points(bits)
    across, down = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(across) + 1, bits.read(down) + 1


def _skip_operating_points(bits: Bits) -> None:
    delay_bits = _skip_timing(bits) if bits.read(1) else 0
    display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:  # level
            bits.read(1)  # tier
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if display_delay and bits.read(1):
            bits.read(4)


def _skip_timing(bits: Bits) -> int:
    """Skip the timing and decoder model; return the length of the model's delays, 0 without one."""
    bits.read(64)
    if bits.read(1):  # equal intervals: a number of variable length
        zeros = 0
        while zeros < 32 and not bits.read(1):
            zeros += 1
        bits.read(zeros if zeros < 32 else 0)
    if not bits.read(1):
        return 0
    delay_bits = bits.read(5) + 1
    bits.read(42)
    return delay_bits
