"""HEIC files written box by box: what no encoder writes, so that readers can be tested with it."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full_box(name: bytes, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">I", version << 24 | flags), *content)


class _Writer:
    """Bits from the highest of the first byte on."""

    def __init__(self) -> None:
        self.bits = ""

    def put(self, value: int, count: int) -> None:
        self.bits += f"{value:0{count}b}"

    def put_golomb(self, value: int) -> None:
        text = f"{value + 1:b}"
        self.bits += "0" * (len(text) - 1) + text

    def data(self) -> bytes:
        padded = self.bits + "1" + "0" * (-(len(self.bits) + 1) % 8)
        return int(padded, 2).to_bytes(len(padded) // 8, "big")


def sequence_parameters(width: int, height: int, layers: int = 0) -> bytes:
    """A NAL unit that announces pictures of a size, complete up to the size."""
    writer = _Writer()
    writer.put(0, 4)
    writer.put(layers, 3)
    writer.put(1, 1)
    writer.put(1 << 80, 88)  # profile
    writer.put(93, 8)  # level
    for _ in range(layers):
        writer.put(3, 2)
    if layers:
        writer.put(0, 2 * (8 - layers))
    for _ in range(layers):
        writer.put(0, 96)
    writer.put_golomb(0)
    writer.put_golomb(1)  # 4:2:0
    writer.put_golomb(width)
    writer.put_golomb(height)
    raw = writer.data()
    out = bytearray()
    for byte in raw:  # a 3 keeps two zeros apart from a small byte
        if byte <= 3 and out[-2:] == b"\0\0":
            out.append(3)
        out.append(byte)
    return bytes((33 << 1, 1)) + bytes(out)


def configuration(*parameters: bytes, length_bytes: int = 4) -> bytes:
    """The box hvcC with these sequence parameters."""
    arrays = struct.pack(">BH", 33, len(parameters)) + b"".join(
        struct.pack(">H", len(each)) + each for each in parameters
    )
    return box(b"hvcC", bytes((1, *[0] * 20, 0xFC | length_bytes - 1, 1)), arrays)


def size_box(width: int, height: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", width, height))


def slice_unit(begins_picture: bool = True, size: int = 8) -> bytes:
    """A NAL unit of a slice, behind its length."""
    unit = bytes((19 << 1, 1, 0x80 if begins_picture else 0x00)) + b"\x55" * size
    return struct.pack(">I", len(unit)) + unit


def grid(rows: int, columns: int, width: int, height: int) -> bytes:
    return struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)


@dataclass
class Item:
    kind: bytes
    content: bytes = b""
    properties: Sequence[int] = ()  # numbers from 1
    made_of: Sequence[int] = ()
    auxiliary_of: Sequence[int] = ()


@dataclass
class Heic:
    """A file; items are numbered from 1."""

    items: Sequence[Item]
    properties: Sequence[bytes]
    primary: int = 1
    more: Mapping[str, bytes] = field(default_factory=dict)  # "meta" and "file": boxes to add at the end of each

    def data(self) -> bytes:
        start = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
        meta = self._meta(0)
        meta = self._meta(len(start) + len(meta) + 8)
        content = b"".join(item.content for item in self.items)
        return start + meta + box(b"mdat", content) + self.more.get("file", b"")

    def _meta(self, offset: int) -> bytes:
        entries = [
            full_box(b"infe", struct.pack(">HH4s", number, 0, item.kind), b"\0", version=2)
            for number, item in enumerate(self.items, 1)
        ]
        places = b""
        for number, item in enumerate(self.items, 1):
            places += struct.pack(">HHHII", number, 0, 1, offset, len(item.content))
            offset += len(item.content)
        associations = b"".join(
            struct.pack(">HB", number, len(item.properties)) + bytes(item.properties)
            for number, item in enumerate(self.items, 1)
        )
        references = [
            box(name, struct.pack(f">HH{len(others)}H", number, len(others), *others))
            for number, item in enumerate(self.items, 1)
            for name, others in ((b"dimg", item.made_of), (b"auxl", item.auxiliary_of))
            if others
        ]
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", struct.pack(">H", self.primary)),
            full_box(b"iinf", struct.pack(">H", len(entries)), *entries),
            full_box(b"iloc", b"\x44\0", struct.pack(">H", len(self.items)), places),
            box(
                b"iprp",
                box(b"ipco", *self.properties),
                full_box(b"ipma", struct.pack(">I", len(self.items)), associations),
            ),
            full_box(b"iref", *references),
            self.more.get("meta", b""),
        )
