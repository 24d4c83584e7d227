"""What the containers of images say, as Pillow understands them, and the limits on what they hold."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from mixmim_serve.containers import MAX_SIDE, PILLOW_FORMATS, decode_cost, inspect
from mixmim_serve.containers.base import MAX_METADATA, RATES
from mixmim_serve.errors import ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from mixmim_serve.preprocess import decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

PICTURES = sorted((REPOSITORY / "tests" / "data" / "robustness").glob("*/*.*"))
PHOTO = Image.open(REPOSITORY / "tests/data/robustness/good/gen__jpeg_baseline.jpg").convert("RGB")  # 150 x 200


def encoded(format_: str, image: Image.Image = PHOTO, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image | None:
    """As Pillow reads the header, or None."""
    try:
        return Image.open(BytesIO(data), formats=PILLOW_FORMATS)
    except Exception:
        return None


# --- what a container says ---


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_sizes_are_pillows(path: Path) -> None:
    data = path.read_bytes()
    try:
        container = inspect(data)
    except ImageError as error:
        with pytest.raises(type(error)):  # by `decode` all the same
            decode(data)
        return
    image = opened(data)
    if image is not None:
        assert (container.format, container.width, container.height) == (
            image.format.replace("MPO", "JPEG"), *image.size)  # fmt: skip
    assert container.decode_cost > 0


GREY16 = Image.fromarray(np.arange(30_000, dtype=np.uint16).reshape(200, 150))
KINDS: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "baseline": ("JPEG", "baseline", lambda: encoded("JPEG")),
    "progressive": ("JPEG", "progressive", lambda: encoded("JPEG", progressive=True)),
    "png": ("PNG", "sequential", lambda: encoded("PNG")),
    "png16": ("PNG", "sequential", lambda: encoded("PNG", GREY16)),
    "gif": ("GIF", "lzw", lambda: encoded("GIF")),
    "lossy": ("WEBP", "lossy", lambda: encoded("WEBP")),
    "lossless": ("WEBP", "lossless", lambda: encoded("WEBP", lossless=True)),
    "lossy-icc": ("WEBP", "lossy", lambda: encoded("WEBP", icc_profile=bytes(99))),
    "bmp": ("BMP", "raw", lambda: encoded("BMP")),
    "avif": ("AVIF", "av1", lambda: encoded("AVIF", speed=9)),
    **{
        f"tiff-{name or 'raw'}": ("TIFF", kind, lambda name=name: encoded("TIFF", compression=name))
        for name, kind in (
            (None, "raw"), ("packbits", "packbits"), ("tiff_lzw", "lzw"), ("tiff_adobe_deflate", "deflate"),
            ("zstd", "zstd"), ("lzma", "lzma"), ("jpeg", "jpeg"),
        )
    },
    "tiff-fax": ("TIFF", "fax", lambda: encoded("TIFF", PHOTO.convert("1"), compression="group4")),
    "bigtiff": ("TIFF", "raw", lambda: encoded("TIFF", big_tiff=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_told_apart(name: str) -> None:
    format_, kind, make = KINDS[name]
    container = inspect(make())
    assert (container.format, container.width, container.height, container.frames) == (format_, 150, 200, 1)
    assert container.kind == kind
    assert f"{format_} {kind}" in RATES


def test_interlaced_and_run_length_encoded_files_are_told_apart() -> None:
    by_name = {path.name: path.read_bytes() for path in PICTURES}
    interlaced = [inspect(data) for data in by_name.values() if data[:4] == b"\x89PNG" and data[28:29] == b"\1"]
    assert interlaced
    assert {container.kind for container in interlaced} == {"interlaced"}
    assert inspect(by_name["pillow__bmp_g_pal4rle.bmp"]).kind == "rle"


@pytest.mark.parametrize(("format_", "frames"), [("PNG", 3), ("WEBP", 3), ("TIFF", 3), ("AVIF", 3), ("GIF", 1)])
def test_frames_are_counted_where_that_is_free(format_: str, frames: int) -> None:
    more = [PHOTO.transpose(method) for method in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)]
    assert inspect(encoded(format_, save_all=True, append_images=more)).frames == frames


def test_a_chain_of_tiff_pages_may_lead_in_a_circle() -> None:
    data = bytearray(encoded("TIFF"))
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * entries, first)
    assert inspect(bytes(data)).frames == 1


@pytest.mark.parametrize("format_", PILLOW_FORMATS)
def test_a_truncated_file_is_left_to_the_decoder(format_: str) -> None:
    data = encoded(format_)
    whole = inspect(data)
    for length in range(1, min(len(data), 2_000), 7):
        try:
            container = inspect(data[:length])
        except UnsupportedImageError:
            continue
        assert container.width in (0, whole.width)
        assert container.height in (0, whole.height)


@pytest.mark.parametrize(("data", "kind"), [(b"", UndecodableImageError), (b"%PDF-1.7", UnsupportedImageError)])
def test_what_is_no_image_is_refused(data: bytes, kind: type[ImageError]) -> None:
    with pytest.raises(kind):
        inspect(data)


# --- what it costs ---


def test_the_cost_follows_pixels_bytes_and_scans() -> None:
    photo = decode_cost(encoded("JPEG", quality=85))
    assert 0.5 < photo / (150 * 200) < 3
    assert decode_cost(encoded("JPEG", PHOTO.resize((300, 400)), quality=85)) > 2 * photo
    assert decode_cost(encoded("JPEG", quality=98)) > photo
    progressive = encoded("JPEG", quality=85, progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert decode_cost(progressive) > 2 * photo
    assert decode_cost(progressive[:-2] + 50 * scan + progressive[-2:]) > 10 * photo
    assert decode_cost(encoded("TIFF", compression="lzma")) > decode_cost(encoded("TIFF"))


def test_a_blank_image_costs_its_pixels() -> None:
    data = encoded("WEBP", Image.new("RGB", (4000, 4000)), lossless=True, quality=0, method=0)
    assert len(data) < 10_000
    assert decode_cost(data) > 16_000_000


def test_progressive_jpeg_in_a_tiff_costs_its_scans() -> None:
    blank = Image.new("RGB", (600, 600))
    jpeg = encoded("JPEG", blank, progressive=True)
    tags = ((256, 600), (257, 600), (258, 8), (259, 7), (262, 6), (273, 8), (277, 3), (278, 600), (279, len(jpeg)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 8 + len(jpeg)) + jpeg + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert inspect(data).kind == "jpeg"
    assert decode_cost(data) > 3 * decode_cost(encoded("TIFF", blank, compression="jpeg"))


# --- what encoders write at most is accepted ---


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def accepted(data: bytes) -> None:
    assert decode(data).size == (150, 200)
    container = inspect(data)
    assert (container.width, container.height) == (150, 200)


def test_the_largest_colour_profile_and_a_depth_map_fit() -> None:
    jpeg = encoded("JPEG")
    profile = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 255)) + bytes(10_000)) for i in range(1, 256))
    depth = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) * 150
    accepted(jpeg[:2] + profile + depth + jpeg[2:])


def test_padding_a_second_exif_segment_and_trailing_data_are_accepted() -> None:
    exif = Image.Exif()
    exif[0x0110] = "camera"
    jpeg = encoded("JPEG", exif=exif)
    again = segment(0xE1, b"Exif\0\0" + bytes(60_000))
    accepted(jpeg[:2] + b"\xff" * 4_000 + jpeg[2:4] + jpeg[4:])
    accepted(jpeg[:2] + again + jpeg[2:])
    accepted(jpeg + np.random.default_rng(0).bytes(20_000_000 - len(jpeg)))  # a film behind the photo: 300 "scans"


def test_markers_within_segments_between_scans_are_no_end() -> None:
    jpeg = encoded("JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    hidden = segment(0xFE, b"\xff\xd9")  # a comment that holds an end marker
    accepted(jpeg[:-2] + hidden + scan + jpeg[-2:])
    with pytest.raises(UndecodableImageError, match="more than 64 scans"):
        inspect(jpeg[:-2] + (hidden + scan) * 60 + jpeg[-2:])


@pytest.mark.parametrize("filler", [b"\xff\0", b"\xff\xd0", b"\xff", b"\0", b"\xff\0ab"])
def test_scans_of_any_bytes_end_at_the_next_marker(filler: bytes) -> None:
    jpeg = encoded("JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    for size in (0, 1, 1_023, 1_024, 5_119, 65_535, 300_000):
        padded = (scan + filler * (size // len(filler))) * 54
        inspect(jpeg[:-2] + padded + jpeg[-2:])
        with pytest.raises(UndecodableImageError, match="scans"):
            inspect(jpeg[:-2] + padded + scan + jpeg[-2:])


def test_many_chunks_texts_and_frames_of_png_are_accepted() -> None:
    png = encoded("PNG")
    start = png.index(b"IDAT") - 4
    (size,) = struct.unpack_from(">I", png, start)
    pixels = png[start + 8 : start + 8 + size]
    small = b"".join(chunk(b"IDAT", pixels[at : at + 8]) for at in range(0, size, 8))
    texts = b"".join(chunk(b"tEXt", b"key %d\0value" % i) for i in range(500))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(500_000)))
    accepted(png[:start] + profile + texts + small + png[start + 12 + size :])
    frames = b"".join(chunk(b"fcTL", struct.pack(">7IBB", i, 150, 200, 0, 0, 1, 1, 0, 0)[:26]) for i in range(20_000))
    accepted(png[:start] + chunk(b"acTL", struct.pack(">II", 20_000, 0)) + png[start:-12] + frames + png[-12:])


def test_a_long_comment_before_a_gif_is_accepted() -> None:
    gif = encoded("GIF")
    first = gif.index(b",", 13 + 768)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 10_000 + b"\0"
    accepted(gif[:first] + comment + gif[first:])


def test_strips_of_one_row_are_accepted() -> None:
    accepted(encoded("TIFF", tiffinfo={278: 1}, compression="tiff_lzw"))
    accepted(encoded("TIFF", tiffinfo={278: 1}))


@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE)])
def test_the_longest_side_is_accepted(size: tuple[int, int]) -> None:
    assert decode(encoded("PNG", Image.new("L", size))).size == size
    longer = Image.new("L", tuple(side + (side > 1) for side in size))
    with pytest.raises(ImageTooLargeError, match="limit of a side is 65,535"):
        inspect(encoded("PNG", longer))


# --- the other limits ---


def test_metadata_is_limited() -> None:
    jpeg = encoded("JPEG")
    metadata = segment(0xE4, bytes(65_000))
    inspect(jpeg[:2] + metadata * (MAX_METADATA // 65_002) + jpeg[2:])
    with pytest.raises(ImageTooLargeError, match="more than 16,000,000 bytes of metadata"):
        inspect(jpeg[:2] + metadata * (MAX_METADATA // 65_002 + 1) + jpeg[2:])


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_exif_directories_are_limited(format_: str) -> None:
    count = 5_000
    entry = struct.pack("<HHII", 0x9999, 4, 1, 0)
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entry * count + bytes(4)
    with pytest.raises(UndecodableImageError, match="more than 4,096 entries"):
        inspect(encoded(format_, exif=block))


def test_what_announces_numbers_that_are_not_there_is_accepted() -> None:
    entry = struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 8)
    accepted(encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)))
    accepted(encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + entry + bytes(4)))


def test_a_decoder_that_finds_more_pixels_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("BMP")
    monkeypatch.setattr(Image.Image, "width", 151)
    with pytest.raises(UndecodableImageError, match="several sizes"):
        decode(data)


def test_limits_on_pixels_are_those_of_the_caller() -> None:
    data = encoded("AVIF", speed=9)
    assert inspect(data, max_pixels=150 * 200).width == 150
    with pytest.raises(ImageTooLargeError, match="150 x 200 pixels, the limit is 29,999"):
        inspect(data, max_pixels=150 * 200 - 1)
