"""Bits of a video header, in order."""

from __future__ import annotations


class Bits:
    """Bits from the highest of the first byte on; zeros after the last."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        """The next `count` bits as an integer."""
        self.left -= count
        shifted = self.value >> self.left if self.left >= 0 else 0
        return shifted & (1 << count) - 1

    def read_golomb(self) -> int:
        """An exponential-Golomb code, ue(v), of up to 32 bits."""
        zeros = 0
        while zeros < 32 and not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)
