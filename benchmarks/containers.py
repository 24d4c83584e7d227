"""What the look at a container costs, and how well it foretells the cost of decoding.

    python -m benchmarks.containers photos --output benchmarks/results/containers_epyc_202611.md

The first table times `inspect` on files of a common size and on the slowest bytes. The second measures every format and
mode with three contents (blank, photos laid out edge to edge, noise), and compares CPU seconds with `decode_cost`; its
unit is a pixel of the photo as an ordinary JPEG. The third does the same with files at the limits.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from benchmarks.fast_jpeg import lay_out
from benchmarks.provenance import about, heading
from mixmim_serve import heif
from mixmim_serve.containers import decode_cost, inspect
from mixmim_serve.containers.jpeg import MAX_SCANS
from mixmim_serve.containers.tiff import MAX_PARTS
from mixmim_serve.preprocess import decode
from mixmim_serve.sources.names import list_images

SIDE = 1792  # pixels of the images of the second table
UNIT = "JPEG baseline"  # the mode whose photo is the unit
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, help="folders of photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    ImageFile.MAXBLOCK = 2**26  # else Pillow cannot write noise as a progressive JPEG
    paths = [path for folder in options.photos for path in list_images(folder)]
    photo = decode(lay_out(paths, SIDE, random.Random(0)))  # noqa: S311
    unit = seconds(encoded(photo, "JPEG", quality=85), options.rounds) / SIDE**2
    lines = [
        *heading(
            "The look at a container, and the cost of decoding", about("containers", arguments, ["pillow", "numpy"])
        ),
        f"Best of {options.rounds} rounds, CPU seconds; the unit, a pixel of the photo as a JPEG: {unit * 1e9:.2f} ns.",
        *("", "## The look", "", *look(photo)),
        *("", "## Formats and modes", "", *modes(photo, unit, options.rounds)),
        *("", "## At the limits", "", *limits(photo, unit)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def look(photo: Image.Image) -> Iterator[str]:
    """The table of `inspect`."""
    small, large = photo.resize((256, 256)), photo.resize((3200, 3200))
    jpeg = encoded(photo.crop((0, 0, 16, 16)), "JPEG")
    exif = Image.Exif()
    exif[0x0110] = "camera"
    files = {
        "JPEG of 16 kB": encoded(small, "JPEG", quality=79),
        "the same with Exif data and a profile": encoded(small, "JPEG", quality=79, exif=exif, icc_profile=bytes(3000)),
        "the same, progressive": encoded(small, "JPEG", quality=79, progressive=True),
        "PNG of 100 kB": encoded(small, "PNG"),
        "JPEG of 2 MB": encoded(large, "JPEG", quality=85),
        "JPEG, 20 MB of stuffed bytes": jpeg[:-2] + b"\xff\0" * 9_900_000 + jpeg[-2:],
        "JPEG, 20 MB of fill bytes": jpeg[:-2] + b"\xff" * 19_800_000 + jpeg[-2:],
    }
    yield "| file | bytes | microseconds, median | least | of the decoding |\n|---|---|---|---|---|"
    for name, data in files.items():
        times = sorted(clock(lambda data=data: inspect(data)) for _ in range(400 if len(data) < 200_000 else 20))
        share = f"{statistics.median(times) / seconds(data, 3):.1%}" if len(data) < 10_000_000 else ""
        yield f"| {name} | {len(data):,} | {statistics.median(times) * 1e6:,.1f} | {times[0] * 1e6:,.1f} | {share} |"


def modes(photo: Image.Image, unit: float, rounds: int) -> Iterator[str]:
    """The table of formats: measured and estimated, in pixels of the unit, for each content."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    contents = (Image.new("RGB", (SIDE, SIDE), (90, 120, 40)), photo, noise)
    yield "Cost of one pixel, measured / estimated, in pixels of the unit; then seconds per megapixel of the photo.\n"
    yield "| format and mode | blank | photo | noise | s per megapixel |\n|---|---|---|---|---|"
    for name, encode in encoders().items():
        cells, photo_seconds = [], 0.0
        for content in contents:
            data = encode(content)
            took = seconds(data, rounds) / SIDE**2
            cells.append(f"{took / unit:.2f} / {decode_cost(data) / SIDE**2:.2f}")
            photo_seconds = took if content is photo else photo_seconds
        yield f"| {name} | {' | '.join(cells)} | {photo_seconds * 1e6:.4f} |"


def encoders() -> dict[str, Callable[[Image.Image], bytes]]:
    """How each format and mode is written."""

    def through(format_: str, mode: str = "RGB", **options: object) -> Callable[[Image.Image], bytes]:
        return lambda image: encoded(image.quantize(256) if mode == "P" else image.convert(mode), format_, **options)

    found = {
        UNIT: through("JPEG", quality=85),
        "JPEG baseline, 4:4:4, quality 95": through("JPEG", quality=95, subsampling=0),
        "JPEG baseline, grey": through("JPEG", "L", quality=85),
        "JPEG baseline, CMYK": through("JPEG", "CMYK", quality=85),
        "JPEG progressive, 10 scans": through("JPEG", quality=85, progressive=True),
        "JPEG progressive, 4:4:4, quality 92": through("JPEG", quality=92, subsampling=0, progressive=True),
        "PNG, RGB": through("PNG", compress_level=4),
        "PNG, RGBA": through("PNG", "RGBA", compress_level=4),
        "PNG, grey": through("PNG", "L", compress_level=4),
        "PNG, grey of 16 bits": lambda image: encoded(Image.fromarray(grey16(image)), "PNG", compress_level=4),
        "PNG, palette": through("PNG", "P"),
        "PNG interlaced, RGB": interlaced,
        "WebP lossy": through("WEBP", quality=80, method=2),
        "WebP lossy, quality 95": through("WEBP", quality=95, method=2),
        "WebP lossless": through("WEBP", lossless=True, method=0, quality=20),
        "GIF": through("GIF", "P"),
        "BMP": through("BMP"),
        "BMP run-length encoded": run_lengths,
        "AVIF": through("AVIF", speed=9),
        "AVIF, 4:4:4, quality 90": through("AVIF", speed=9, quality=90, subsampling="4:4:4"),
        "TIFF raw": through("TIFF"),
        "TIFF raw, floats": through("TIFF", "F"),
        "TIFF packbits": through("TIFF", compression="packbits"),
        "TIFF LZW": through("TIFF", compression="tiff_lzw"),
        "TIFF deflate": through("TIFF", compression="tiff_adobe_deflate"),
        "TIFF zstd": through("TIFF", compression="zstd"),
        "TIFF LZMA": through("TIFF", compression="lzma"),
        "TIFF JPEG": through("TIFF", compression="jpeg"),
        "TIFF fax, group 3": through("TIFF", "1", compression="group3"),
        "TIFF fax, group 4": through("TIFF", "1", compression="group4"),
    }
    if heif.is_installed():
        heif.load().register_heif_opener()
        found |= {
            "HEIC": through("HEIF", quality=80),
            "HEIC, 4:4:4, quality 95": through("HEIF", quality=95, chroma=444),
            "HEIC, tiles of 512": through("HEIF", quality=80, tile_size=512),
        }
    return found


def limits(photo: Image.Image, unit: float) -> Iterator[str]:
    """The table of files at the limits of pixels and parts."""
    large = Image.new("RGB", (8000, 8000))
    progressive = encoded(large, "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    rows = photo.convert("L").resize((16, MAX_PARTS - 1))
    files = {
        f"JPEG progressive, 64 megapixels, {MAX_SCANS} scans": progressive[:-2] + scan * (MAX_SCANS - 10) + b"\xff\xd9",
        "JPEG baseline, 64 megapixels, blank": encoded(large, "JPEG"),
        "WebP lossless, 64 megapixels, blank": encoded(large, "WEBP", lossless=True, method=0, quality=0),
        "WebP lossy, 64 megapixels, blank": encoded(large, "WEBP", method=0),
        "PNG, 64 megapixels, blank": encoded(large, "PNG"),
        "AVIF, 64 megapixels, blank": encoded(large, "AVIF", speed=10),
        f"TIFF, {MAX_PARTS - 1:,} strips of 16 bytes": encoded(rows, "TIFF", tiffinfo={278: 1}),
    }
    yield "| file | bytes | seconds | cost, millions | cost at the unit's speed, seconds |\n|---|---|---|---|---|"
    for name, data in files.items():
        cost = decode_cost(data)
        yield f"| {name} | {len(data):,} | {seconds(data, 1):.2f} | {cost / 1e6:,.0f} | {cost * unit:.2f} |"


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def grey16(image: Image.Image) -> np.ndarray:
    """uint16 (H, W), noisy in its low byte."""
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    return grey * 256 + grey[::-1]


def interlaced(image: Image.Image) -> bytes:
    """An interlaced PNG, which Pillow cannot write: rows of seven passes, each filtered with the pixel to its left."""
    pixels, body = np.asarray(image), b""
    for left, top, across, down in ADAM7:
        part = pixels[top::down, left::across]
        rows = part.copy()
        rows[:, 1:] -= part[:, :-1]
        body += np.insert(rows.reshape(len(rows), -1), 0, 1, axis=1).tobytes()
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(body, 4)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4) for name, content in chunks
    )


def run_lengths(image: Image.Image) -> bytes:
    """A BMP of runs, which Pillow cannot write: of up to 255 equal pixels, so of 1 to 3 in a photo."""
    body = bytearray()
    for row in np.asarray(image.quantize(256)):
        starts = np.flatnonzero(np.diff(row, prepend=np.int16(row[0]) + 1))
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            body += b"".join(bytes((min(255, stop - at), row[start])) for at in range(start, stop, 255))
        body += b"\0\0"
    head = struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078)
    info = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(body), 0, 0, 0, 0)
    return b"BM" + head + info + bytes(range(256)) * 4 + bytes(body) + b"\0\1"


def seconds(data: bytes, rounds: int) -> float:
    """The CPU seconds of decoding, the least of the rounds."""
    return min(clock(lambda: decode(data), time.process_time) for _ in range(rounds))


def clock(call: Callable[[], object], read: Callable[[], float] = time.perf_counter) -> float:
    """The seconds of one call."""
    began = read()
    call()
    return read() - began


if __name__ == "__main__":
    main()
