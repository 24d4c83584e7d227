"""Image files that cost far more than they hold: each is refused by its container, in little time and memory.

The files are made here. Each is decoded in a process of its own, under limits of CPU seconds and address space. Before
`mixmim_serve.containers` existed, they were decoded or ran into these limits, but for two that failed late: what a file
took then stands beside it.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are set as Linux has them")

FULL = 19_900_000  # bytes: what a request may carry
CPU_SECONDS, MEGABYTES = 1, 200  # for one file, on top of what the interpreter takes

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {}  # by name: how the file is made, and what the refusal says


def attack(refusal: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Register a function that makes a file."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        ATTACKS[make.__name__] = (make, refusal)
        return make

    return register


def encoded(format_: str, image: Image.Image | None = None, **options: object) -> bytes:
    stream = BytesIO()
    (image or Image.new("RGB", (16, 16), "red")).save(stream, format_, **options)
    return stream.getvalue()


# JPEG


def segment(marker: int, payload: bytes = b"") -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def jpeg_with(junk: bytes) -> bytes:
    """A JPEG with something in front of its tables."""
    jpeg = encoded("JPEG")
    return jpeg[:2] + junk + jpeg[2:]


@attack("more than 64 scans")  # 36 s for 480 scans of 64 megapixels
def jpeg_of_480_scans() -> bytes:
    jpeg = encoded("JPEG", Image.new("RGB", (8000, 8000)), progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * 470 + jpeg[-2:]


@attack("more than 2,000 segments")  # 6 s and 700 MB
def jpeg_of_empty_segments() -> bytes:
    return jpeg_with(segment(0xE5) * (FULL // 4))


@attack("more than 16 Exif segments")  # 1.2 s for 200,000 of them, 98 s for 1.7 million: each copies all before it
def jpeg_of_exif_segments() -> bytes:
    return jpeg_with(segment(0xE1, b"Exif\0\0II") * (FULL // 12))


@attack("more than 65,536 bytes between its segments")  # 8 s: Pillow reads fill bytes one by one
def jpeg_of_fill_bytes() -> bytes:
    return jpeg_with(b"\xff" * FULL)


@attack("more than 2,000 segments")  # 5 s
def jpeg_of_restart_markers() -> bytes:
    return jpeg_with(b"\xff\xd0" * (FULL // 2))


@attack("more than 262,144 bytes of tables")  # 1 s, and 640 MB where the frame header is repeated like this
def jpeg_of_components() -> bytes:
    return jpeg_with(segment(0xC0, b"\x08\0\x10\0\x10\x03" + b"\1\x11\0" * 21_000) * (FULL // 63_010))


@attack("more than 4,096 Photoshop resources")  # 0.8 s
def jpeg_of_photoshop_resources() -> bytes:
    resources = segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5_000)
    return jpeg_with(resources * (FULL // len(resources)))


# PNG


def chunk(name: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png_with(chunks: bytes) -> bytes:
    """A PNG with something between its header and its pixels."""
    png = encoded("PNG")
    return png[:33] + chunks + png[33:]


@attack("more than 16,384 chunks")  # 4 s
def png_of_texts() -> bytes:
    return png_with(chunk(b"tEXt") * (FULL // 12))


@attack("more than 16,384 chunks")  # 1.3 s
def png_of_empty_pixels() -> bytes:
    return png_with(chunk(b"IDAT") * (FULL // 12))


@attack("more than 16,384 chunks")  # 3 s
def png_of_texts_after_its_pixels() -> bytes:
    png = encoded("PNG")
    return png[:-12] + chunk(b"tEXt") * (FULL // 12) + png[-12:]


@attack("more than 32 compressed texts and colour profiles")  # 42 s: 20,000 profiles of 1 MB
def png_of_colour_profiles() -> bytes:
    return png_with(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * 19_000)


@attack("limit of a side is 65,535")  # 240 MB of 8 kB
def png_of_one_row() -> bytes:
    return encoded("PNG", Image.new("1", (60_000_000, 1)))


# GIF, WebP, BMP


@attack("more than 65,536 blocks before its first image")  # 1.5 s
def gif_of_nothing() -> bytes:
    gif = encoded("GIF", Image.new("P", (16, 16)))
    first = gif.index(b",", 13)
    return gif[:first] + bytes(FULL) + gif[first:]


@attack("65535 x 65535 pixels")  # failed late: below 178 megapixels Pillow fills the frame before it tells the size
def gif_of_a_frame_beyond_its_screen() -> bytes:
    return (
        b"GIF89a\x10\0\x10\0\0\0\0" + b"!\xf9\4\x0c\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\0;"
    )


@attack("more than 16,384 chunks")  # 0.2 s and 300 MB
def webp_of_empty_chunks() -> bytes:
    webp = encoded("WEBP")
    body = b"WEBPVP8X\x0a\0\0\0\0\0\0\0\x0f\0\0\x0f\0\0" + webp[12:] + b"ABCD\0\0\0\0" * (FULL // 8)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@attack("run-length encoded BMP image has 8000 x 8000 pixels")  # 7 s, of 33 kB: decoded in Python
def bmp_of_short_rows() -> bytes:
    rows = b"\1\1\0\0" * 8000
    head = struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", 40, 8000, 8000, 1, 8, 1, len(rows), *[0] * 4) + bytes(1024) + rows


# TIFF


def tiff(pixels: bytes, *tags: tuple[int, int, int, int], side: int = 16) -> bytes:
    """A grey TIFF of (side, side) pixels in one strip; `tags` (tag, type, count, value) replace or follow the usual."""
    usual = ((256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8))
    table = {tag[0]: tag for tag in (*usual, (278, 4, 1, side), (279, 4, 1, side * side), *tags)}
    entries = b"".join(struct.pack("<HHII", *table[tag]) for tag in sorted(table))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(table)) + entries + bytes(4)


@attack("more than 20,000 numbers in its Exif tags")  # 6 s and 460 MB: Pillow makes a fraction of each
def tiff_of_exif_fractions() -> bytes:
    count = 2_400_000
    exif = struct.pack("<HHHII", 1, 0x9999, 5, count, 8) + bytes(4)
    return tiff(struct.pack("<II", 3, 7) * count + exif, (34665, 4, 1, 8 + 8 * count))


@attack("strips or tiles, more than cover it")  # 1.5 s for 1,000 strips, each of them the whole image
def tiff_of_strips_over_each_other() -> bytes:
    side, count = 4000, 60_000
    offsets = struct.pack("<I", 8) * count
    table = 8 + side * side
    tags = ((273, 4, count, table), (278, 4, 1, side - 1), (279, 4, count, table))
    return tiff(bytes(side * side) + offsets, *tags, side=side)


@attack("strips or tiles that overlap")  # 10 s: two strips, one byte apart, of which Pillow reads byte after byte
def tiff_of_strips_a_byte_apart() -> bytes:
    side = 4400
    table = 8 + side * side
    tags = ((273, 4, 2, table), (278, 4, 1, side // 2), (279, 4, 2, table))
    return tiff(bytes(side * side) + struct.pack("<II", 8, 9), *tags, side=side)


@attack("more than 65,536 strips or tiles")  # 2 s, of 2 MB
def tiff_of_small_strips() -> bytes:
    count = 100_000
    tags = ((257, 4, 1, 60_000), (278, 4, 1, 1), (273, 4, count, 8 + 1_600_000), (279, 4, count, 8 + 1_600_000))
    return tiff(bytes(1_600_000) + struct.pack("<I", 8) * count, *tags)


@attack("more than 4,096 entries in a directory")  # 1 s
def tiff_of_entries() -> bytes:
    usual = ((256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (273, 16), (278, 16), (279, 256))
    entries = [struct.pack("<HHQQ", tag, 4, 1, value) for tag, value in usual]
    entries += [struct.pack("<HHQQ", 1000, 4, 1, 0)] * 900_000
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(entries)) + b"".join(entries) + bytes(8)


# AVIF


def boxes(avif: bytes, *names: bytes) -> list[int]:
    """The offsets of nested boxes."""
    found, start = [], 0
    for name in names:
        while avif[start + 4 : start + 8] != name:
            start += struct.unpack_from(">I", avif, start)[0]
        found.append(start)
        start += 12 if name == b"meta" else 8
    return found


def with_box(avif: bytes, content: bytes, *names: bytes) -> bytes:
    """The file with the content of a nested box replaced."""
    places, result = boxes(avif, *names), bytearray(avif)
    (size,) = struct.unpack_from(">I", avif, places[-1])
    result[places[-1] + 8 : places[-1] + size] = content
    for place in places:
        (before,) = struct.unpack_from(">I", avif, place)
        result[place : place + 4] = struct.pack(">I", before + len(content) + 8 - size)
    return bytes(result)


@attack("more than 8,192 entries in its tables of items")  # 6 s, of 180 kB: libavif searches all items for each
def avif_of_items() -> bytes:
    entries = b"".join(struct.pack(">HB", item + 2, 0) for item in range(60_000))
    return with_box(encoded("AVIF"), bytes(4) + struct.pack(">I", 60_000) + entries, b"meta", b"iprp", b"ipma")


@attack("more than 16,384 pieces of items")  # 3 s and 2 GB, of 12 kB: extents of no bytes
def avif_of_extents() -> bytes:
    items = b"".join(struct.pack(">HHH", item + 1, 0, 65_535) for item in range(2_000))
    return with_box(encoded("AVIF"), bytes(6) + struct.pack(">H", 2_000) + items, b"meta", b"iloc")


@attack("a frame of the image has 8192 x 8192 pixels")  # 0.3 s and 200 MB for what says that it has 16 x 16
def avif_of_a_frame_larger_than_it_says() -> bytes:
    avif = encoded("AVIF", Image.new("RGB", (8192, 8192)), speed=10)
    size = avif.index(b"ispe") + 8
    return avif[:size] + struct.pack(">II", 16, 16) + avif[size + 8 :]


@attack("more than 65,536 frames")  # failed late: libavif lists them before it finds that they do not fit
def avif_of_frames() -> bytes:
    frames = [Image.new("RGB", (16, 16), "blue")] * 2
    avif = encoded("AVIF", save_all=True, append_images=frames)
    sizes = avif.index(b"stsz") + 8
    return avif[:sizes] + struct.pack(">II", 1, 2_000_000) + avif[sizes + 8 :]


# What a process of its own does with each file: it forks, so that the imports are paid for once

RUNNER = """
import json, os, resource, sys, warnings
from pathlib import Path
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import decode
warnings.simplefilter("ignore")
folder, seconds, megabytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def attempt(data):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    try:
        return f"decoded to {decode(data).size}"
    except ImageError as error:
        return str(error)

outcomes = {}
for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, attempt(data).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    outcomes[path.name] = os.read(reader, 4096).decode() if not status else f"ended by {status}"
    os.close(reader)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each file."""
    folder = tmp_path_factory.mktemp("attacks")
    for name, (make, _) in ATTACKS.items():
        (folder / name).write_bytes(make())
    command = [sys.executable, "-c", RUNNER, folder, str(CPU_SECONDS), str(MEGABYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for path in Path(folder).iterdir():
        path.unlink()
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_little_time_and_memory(name: str, outcomes: dict[str, str]) -> None:
    assert ATTACKS[name][1] in outcomes[name]
