"""AVIF (ISO/IEC 23000-22): boxes of items and of tracks, and the sizes in the AV1 data they point to.

libavif decodes an AV1 frame at its own size, whatever the boxes say.
"""

from __future__ import annotations

from mixmim_serve.containers.av1 import sequence_sizes
from mixmim_serve.containers.base import Header
from mixmim_serve.containers.boxes import Boxes, Item


def read(data: bytes, header: Header) -> None:
    """Walk over the boxes, then over the AV1 units that they point to."""
    header.kind = "av1"
    boxes = _Avif(data, header)
    try:
        for name, parent, start, end in boxes.walk(0, len(data)):
            boxes.read(name, parent, start, end)
    finally:  # of a file that ends early, what there is
        header.set_size(*boxes.size())
    for item in boxes.items:
        boxes.read_item(item)
    for start, size in zip(boxes.chunks, boxes.samples, strict=False):
        boxes.read_units(data, start, start + size)


class _Avif(Boxes):
    """The boxes, and the AV1 units in them."""

    track_size = (0, 0)

    def read_sample_description(self, start: int) -> None:
        """The size of the track of a sequence."""
        if self.data[start + 12 : start + 16] == b"av01":
            self.track_size = self.unpack("2H", start + 40)[:2]  # type: ignore[assignment]

    def size(self) -> tuple[int, int]:
        """The size of the track of a sequence, else of the primary item, else the first there is."""
        if self.data[8:12] == b"avis" and any(self.track_size):
            return self.track_size
        found = [*self.sizes_of(self.primary), *self.sizes, self.track_size]
        return next((size for size in found if any(size)), (0, 0))

    def read_item(self, item: Item) -> None:
        """Check what an item holds: Exif data, or AV1 units."""
        places = self.pieces(item)
        if self.kinds.get(item.number) == b"Exif":
            self.check_exif(places)
        elif len(places) == 1:
            self.read_units(self.data, *places[0])
        else:
            block = self.content(places)
            self.read_units(block, 0, len(block))

    def read_units(self, data: bytes, start: int, end: int) -> None:
        """Check the frame sizes that AV1 sequence headers announce."""
        for size in sequence_sizes(data, start, min(end, len(data))):
            self.count_box()
            if size is not None:
                self.header.check_size("a frame of the image", *size)
