"""HEIC (ISO/IEC 23008-12): items of HEVC pictures, and those that are put together from others.

libheif decodes each tile of a grid as often as the grid refers to it, and follows grids of grids; libde265 decodes a
picture at its own size, whatever the boxes say, and every slice of it. So pixels and bytes are added up along the way
that libheif would take. Kinds of items that no camera makes the photo of are refused: fewer decoders see foreign data.
"""

from __future__ import annotations

from typing import NamedTuple

from mixmim_serve.containers import hevc
from mixmim_serve.containers.base import ENDS_EARLY, RATES, Header
from mixmim_serve.containers.boxes import Boxes, Item
from mixmim_serve.errors import ImageTooLargeError, UndecodableImageError

MAX_WORK = 4  # times the limit of pixels: written 2, the tiles and the canvas; 3 with transparency
MAX_SLICES = 64  # of a picture: written 1 to 20
_MAX_DEPTH = 4  # items made of items: written 1
_FOUR_BYTES = 3  # how a configuration says that the length of a unit has four
_COPIED = 4  # pixels of a tile that are copied in the time in which one is decoded, at least
_SINGLE = {b"meta", b"pitm", b"iinf", b"iloc", b"iref", b"iprp", b"ipco", b"idat"}
_DERIVED = (b"grid", b"iovl", b"iden")
_REFUSED = {b"moov": "a sequence of images", b"mini": "an image in short form"}


class Work(NamedTuple):
    """What decoding an item takes."""

    pixels: int
    weighted: int  # for the cost: pixels times slices, and copied ones as what they take
    bytes: int


def read(data: bytes, header: Header) -> None:
    """Walk over the boxes, then along the items that make up the image.

    Raises:
        UndecodableImageError: also where a box ends early, for libheif may read on behind it what was not checked.
    """
    header.kind = "hevc"
    boxes = _Heic(data, header)
    try:
        for name, parent, start, end in boxes.walk(0, len(data)):
            boxes.read(name, parent, start, end)
        header.set_size(*boxes.size())
        boxes.check_items()
    except ENDS_EARLY as error:
        raise UndecodableImageError("the HEIC image is truncated or damaged: send the complete file.") from error


class _Heic(Boxes):
    """The boxes, and what the image is made of."""

    def __init__(self, data: bytes, header: Header) -> None:
        super().__init__(data, header)
        self.seen: set[bytes] = set()
        self.turns: dict[int, int] = {}  # quarter turns by the position of the property,
        self.coded: dict[int, tuple[int, int]] = {}  # and sizes of coded pictures
        self.made_of: dict[int, list[int]] = {}  # items by the item that is made of them
        self.auxiliary: dict[int, list[int]] = {}  # items such as an alpha channel, by the item they belong to
        self.places: dict[int, Item] = {}
        self.known: dict[int, Work] = {}

    def read(self, name: bytes, parent: bytes, start: int, end: int) -> None:
        """Take from one box what is needed; what libheif would resolve in its own way is refused."""
        if what := _REFUSED.get(name):
            raise UndecodableImageError(f"the HEIC file holds {what}, which is not read: save it as JPEG.")
        if name in _SINGLE:
            self.header.at_most(1, 1 + (name in self.seen), f"{name.decode()} boxes")
            self.seen.add(name)
        super().read(name, parent, start, end)

    def read_property(self, name: bytes, start: int, end: int) -> None:
        """The size of an item or of its pictures, or how it is turned."""
        position = len(self.sizes)
        super().read_property(name, start, end)
        if name == b"irot":
            self.turns[position] = self.data[start] & 3
        elif name == b"hvcC":
            self.coded[position] = self.read_parameters(start, end)

    def read_parameters(self, start: int, end: int) -> tuple[int, int]:
        """The largest size that the decoder configuration of a picture announces."""
        if self.data[start + 21] & 3 != _FOUR_BYTES:
            raise UndecodableImageError("the HEIC image has lengths of fewer than four bytes: save it as JPEG.")
        largest, at = (0, 0), start + 23
        for _ in range(self.data[start + 22]):
            (count,) = self.unpack("H", at + 1)
            at += 3
            for _ in range(count):
                self.count_box()
                (length,) = self.unpack("H", at)
                found = hevc.unit(self.data[at + 2 : min(end, at + 2 + length)][:256])
                at += 2 + length
                if found.size is not None:
                    largest = self.checked(found.size, largest)
        return largest

    def checked(self, size: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        """The larger of two sizes, once the first is within the limits."""
        self.header.check_size("a picture of the image", *size)
        return max(size, other, key=_area)

    def read_item_type(self, start: int) -> None:
        """What an item holds, said once."""
        known = len(self.kinds)
        super().read_item_type(start)
        self.header.at_most(1, 1 + (len(self.kinds) == known), "kinds of an item")

    def read_reference(self, kind: bytes, start: int) -> None:
        """Which items an item is made of, or belongs to."""
        code, width = ("I", 4) if self.wide_references else ("H", 2)
        (item,) = self.unpack(code, start)
        (count,) = self.unpack("H", start + width)
        others = list(self.unpack(f"{count}{code}", start + width + 2))
        if kind == b"dimg":
            self.made_of.setdefault(item, []).extend(others)
        elif kind == b"auxl":
            for other in others:
                self.auxiliary.setdefault(other, []).append(item)

    def size(self) -> tuple[int, int]:
        """The size of the primary item, turned; a later crop is not applied."""
        numbers = self.associations.get(self.primary, [])
        found = [*self.sizes_of(self.primary), *self.sizes]
        width, height = next((size for size in found if any(size)), (0, 0))
        return (height, width) if sum(self.turns.get(number, 0) for number in numbers) % 2 else (width, height)

    def check_items(self) -> None:
        """Add up what the image is made of, and check the Exif data.

        Raises:
            ImageTooLargeError: decoding it takes far more pixels than the image has.
            UndecodableImageError: no primary item, or made of what is not decoded.
        """
        for item in self.items:
            if self.kinds.get(item.number) == b"Exif":
                self.check_exif(self.pieces(item))
            self.header.at_most(1, 1 + (item.number in self.places), "places of an item")
            self.places[item.number] = item
        if self.primary not in self.places:
            raise UndecodableImageError("the HEIC file names no image of its own to decode: save it as JPEG.")
        total = self.work(self.primary)
        for number in [other for owner in list(self.known) for other in self.auxiliary.get(owner, [])]:
            if number not in self.known:
                total = _sum(total, self.work(number))
        limit = MAX_WORK * self.header.max_pixels
        if total.pixels > limit:
            raise ImageTooLargeError(
                f"the HEIC image is made of {total.pixels:,} pixels, the limit is {limit:,} in all: send a smaller one."
            )
        self.header.coded_bytes = total.bytes
        largest = self.header.width * self.header.height
        self.header.extra_cost += max(0, total.weighted - largest) * RATES["HEIC hevc"].pixel

    def work(self, number: int, depth: int = 0) -> Work:
        """What decoding an item takes, each item that it is made of as often as it refers to it."""
        if number not in self.known:
            self.header.at_most(_MAX_DEPTH, depth, "levels of items made of items")
            self.known[number] = self.work_of(number, self.kinds.get(number, b""), depth)
        return self.known[number]

    def work_of(self, number: int, kind: bytes, depth: int) -> Work:
        """`work`, computed."""
        if kind == b"hvc1":
            return self.work_of_picture(number)
        if kind not in _DERIVED:
            raise UndecodableImageError(
                f"the HEIC file is made of {kind.decode('latin-1') or 'nothing'!r}, not of HEVC pictures: save it as "
                "JPEG."
            )
        width, height = max(self.sizes_of(number), default=(0, 0), key=_area)
        if kind != b"iden" and number in self.places:
            canvas = self.canvas(kind, self.content(self.pieces(self.places[number])))
            width, height = self.checked(canvas, (width, height))
        total = Work(width * height, width * height // _COPIED, 0)
        for other in self.made_of.get(number, []):
            total = _sum(total, self.work(other, depth + 1))
            self.header.at_most(4 * len(self.data) + 4_000_000, total.bytes, "bytes in items that are used again")
        return total

    def canvas(self, kind: bytes, content: bytes) -> tuple[int, int]:
        """Width and height that a grid or overlay has; (0, 0) where it is too short to say."""
        wide = len(content) > 1 and content[1] & 1
        at, size = (4 if kind == b"grid" else 10), (4 if wide else 2)
        numbers = (content[at : at + size], content[at + size : at + 2 * size])
        return int.from_bytes(numbers[0], "big"), int.from_bytes(numbers[1], "big")

    def work_of_picture(self, number: int) -> Work:
        """What decoding a coded picture takes; the units in its data may announce another size than its properties."""
        coded = [self.coded[each] for each in self.associations.get(number, []) if each in self.coded]
        coded = coded or list(self.coded.values())  # where none is named, the worst
        largest = max([*coded, *self.sizes_of(number)], default=(0, 0), key=_area)
        places = self.pieces(self.places[number]) if number in self.places else []
        block = self.content(places)
        slices = pictures = 0
        for unit in hevc.units(block, 0, len(block)):
            self.count_box()
            slices, pictures = slices + unit.is_slice, pictures + unit.begins_picture
            if unit.size is not None:
                largest = self.checked(unit.size, largest)
        self.header.at_most(MAX_SLICES, slices, "slices in a picture")
        self.header.at_most(1, pictures, "pictures in an item")
        pixels = largest[0] * largest[1]
        return Work(pixels, pixels * max(1, slices), len(block))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _sum(one: Work, other: Work) -> Work:
    return Work(one.pixels + other.pixels, one.weighted + other.weighted, one.bytes + other.bytes)
