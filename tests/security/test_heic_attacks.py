"""HEIC files that cost far more than they hold, or that hold what no camera writes: refused by a look at the boxes.

They need no decoder: each is refused before one sees it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest
from heic_files import Heic, Item, box, configuration, full_box, grid, sequence_parameters, size_box, slice_unit

from mixmim_serve import heif
from mixmim_serve.containers import inspect
from mixmim_serve.errors import ImageError

SECONDS = 1.0  # for one file, of which each is refused in a hundredth

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {}


def attack(refusal: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Register a function that makes a file."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        ATTACKS[make.__name__] = (make, refusal)
        return make

    return register


def properties(side: int = 512) -> list[bytes]:
    return [size_box(side, side), configuration(sequence_parameters(side, side))]


def tile(content: bytes = b"", **more: object) -> Item:
    return Item(b"hvc1", content or slice_unit(), (1, 2), **more)  # type: ignore[arg-type]


@attack("made of")
def one_tile_used_4000_times() -> bytes:
    return Heic([Item(b"grid", grid(50, 80, 512, 512), (1,), (2,) * 4000), tile()], properties()).data()


@attack("bytes in items that are used again")
def one_tile_of_noise_used_4000_times() -> bytes:
    noise = tile(slice_unit(size=1_000_000))
    return Heic([Item(b"grid", grid(50, 80, 64, 64), (1,), (2,) * 4000), noise], properties(64)).data()


@attack("used again")
def grids_of_grids() -> bytes:
    """Four levels of 30 each: 810,000 pictures."""
    levels = [Item(b"grid", grid(5, 6, 64, 64), (1,), (number,) * 30) for number in range(2, 6)]
    return Heic([*levels, tile()], properties()).data()


@attack("more than 4 levels of items made of items")
def an_item_made_of_itself() -> bytes:
    return Heic([Item(b"grid", grid(1, 1, 64, 64), (1,), (1,))], properties()).data()


@attack("more than 4 levels of items made of items")
def ten_identities() -> bytes:
    return Heic([*[Item(b"iden", b"", (1,), (number,)) for number in range(2, 12)], tile()], properties()).data()


@attack("a picture of the image has 100000 x 100000 pixels")
def a_grid_with_a_huge_canvas() -> bytes:
    return Heic([Item(b"grid", grid(1, 1, 100_000, 100_000), (1,), (2,)), tile()], properties()).data()


@attack("the image has 9000 x 9000 pixels")
def an_overlay_with_a_huge_canvas() -> bytes:
    canvas = bytes((0, 1)) + bytes(8) + struct.pack(">II", 9000, 9000)
    return Heic([Item(b"iovl", canvas, (1,), (2,)), tile()], properties()).data()


@attack("more than 64 slices in a picture")
def a_picture_of_2000_slices() -> bytes:
    return Heic([tile(slice_unit() + slice_unit(begins_picture=False) * 2000)], properties(8000)).data()


@attack("more than 1 pictures in an item")
def an_item_of_50_pictures() -> bytes:
    return Heic([tile(slice_unit() * 50)], properties(8000)).data()


@attack("more than 16,384 boxes")
def a_million_empty_units() -> bytes:
    return Heic([tile(struct.pack(">IB", 1, 39 << 1) * 1_000_000)], properties()).data()


@attack("more than 8,192 entries in its tables of items")
def thousands_of_items() -> bytes:
    return Heic([tile() for _ in range(3000)], properties()).data()


@attack("made of")
def an_alpha_channel_of_alpha_channels() -> bytes:
    owners = [tile(auxiliary_of=(1,)) for _ in range(8)]
    return Heic([tile(), *owners], properties(8000)).data()


@attack("a sequence of images")
def a_sequence() -> bytes:
    return Heic([tile()], properties(), more={"file": box(b"moov")}).data()


@attack("an image in short form")
def a_short_form() -> bytes:
    return Heic([tile()], properties(), more={"file": box(b"mini", bytes(20))}).data()


@attack("not of HEVC pictures")
def uncompressed_pixels() -> bytes:
    return Heic([Item(b"unci", bytes(100), (1,))], properties()).data()


@attack("not of HEVC pictures")
def a_grid_of_another_codec() -> bytes:
    items = [Item(b"grid", grid(1, 1, 64, 64), (1,), (2,)), Item(b"av01", bytes(100), (1,))]
    return Heic(items, properties()).data()


@attack("more than 1 meta boxes")
def two_meta_boxes() -> bytes:
    return Heic([tile()], properties(), more={"file": full_box(b"meta")}).data()


@attack("more than 1 kinds of an item")
def an_item_of_two_kinds() -> bytes:
    second = full_box(b"infe", struct.pack(">HH4s", 1, 0, b"grid"), b"\0", version=2)
    data = Heic([tile()], properties()).data()
    first = data.index(b"infe") - 4
    length = int.from_bytes(data[first : first + 4], "big")
    longer = bytearray(data[: first + length] + second + data[first + length :])
    for name in (b"meta", b"iinf"):
        place = data.index(name) - 4
        size = int.from_bytes(data[place : place + 4], "big") + len(second)
        longer[place : place + 4] = size.to_bytes(4, "big")
    return bytes(longer)


@attack("names no image of its own")
def no_primary_item() -> bytes:
    return Heic([tile()], properties(), primary=7).data()


@attack("more than 1,000,000 bytes of Exif data")
def a_huge_block_of_exif() -> bytes:
    return Heic([tile(), Item(b"Exif", bytes(2_000_000))], properties()).data()


@attack("truncated or damaged")
def a_box_that_ends_early_behind_what_is_read() -> bytes:
    return Heic([tile()], properties(), more={"file": struct.pack(">I4s", 1, b"free") + b"\0"}).data()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_little_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "require", lambda: None)
    make, refusal = ATTACKS[name]
    data = make()
    start = time.process_time()
    with pytest.raises(ImageError, match=refusal):
        inspect(data)
    assert time.process_time() - start < SECONDS


def test_the_same_file_without_what_is_wrong_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every refusal above is for its own reason."""
    monkeypatch.setattr(heif, "require", lambda: None)
    assert inspect(Heic([tile()], properties()).data()).width == 512
    items = [Item(b"grid", grid(2, 2, 1000, 1000), (3,), (2, 2, 2, 2)), tile(), tile(auxiliary_of=(1,))]
    assert inspect(Heic(items, [*properties(), size_box(1000, 1000)]).data()).width == 1000
