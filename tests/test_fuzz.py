# ruff: noqa: PT017 - a refusal is one of two right results, to be looked at and not to be demanded
"""Bytes that nobody meant to send: images, forms and lines, cut, spliced and flipped by hypothesis.

A few seconds here; `make fuzz` goes on for minutes. tests/data/fuzz holds a folder a parser: seeds, and what was once
found. They are tried first, each as it is, and mutated. A failing case is left there, as `found`, in its smallest form.
"""

from __future__ import annotations

import asyncio
import email
import io
import itertools
import json
import os
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import orjson
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmim_serve.config import Preprocessing
from mixmim_serve.containers import inspect
from mixmim_serve.errors import ImageError
from mixmim_serve.preprocess import decode, resize_and_crop
from mixmim_serve.service.body import Part, split_form
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.responses import json_bytes
from mixmim_serve.service.routes.stream import parse_line, split_lines
from mixmim_serve.service.uploads import decode_inputs, parse_json

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LONGER = int(os.environ.get("FUZZ", "1"))  # so many times as many cases, drawn anew each time
FOUND = REPOSITORY / "tests" / "data" / "fuzz"
PICTURES = REPOSITORY / "tests" / "data" / "robustness"
MAX_PIXELS = 4_000_000
MAX_SECONDS = 10.0  # for one image
MAX_MEMORY = 300 * 2**20  # 4 megapixels in the worst format, and what the allocator keeps
MAX_PART = 100


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same cases at each run of the suite; as many others as wanted in `make fuzz`."""
    return settings(
        max_examples=examples * LONGER, derandomize=LONGER == 1, deadline=None, database=None,
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip


def seeds(kind: str) -> list[bytes]:
    """What is kept for one parser."""
    return [path.read_bytes() for path in sorted((FOUND / kind).iterdir())]


def kept(kind: str, data: bytes, check: Callable[[bytes], object]) -> None:
    """Check; what fails stays in a file. Hypothesis runs its smallest case last."""
    try:
        check(data)
    except BaseException:
        (FOUND / kind / "found").write_bytes(data)
        raise


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """One of the originals after a few accidents."""
    data = bytearray(draw(st.sampled_from(originals)))
    chance = random.Random(draw(st.integers(0, 2**32)))  # noqa: S311
    for _ in range(draw(st.integers(0, 6))):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 4, 16, 256))
        kind = draw(st.sampled_from(("set", "bits", "cut", "drop", "repeat", "splice", "extreme")))
        if kind == "set":
            data[at : at + length] = chance.randbytes(length)
        elif kind == "bits" and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * chance.randrange(1, 20)
        elif kind == "splice":
            other = chance.choice(originals)
            start = chance.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]
        else:  # sizes, counts and offsets
            data[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
    return bytes(data)


@pytest.mark.parametrize("kind", ["image", "multipart", "ndjson"])
def test_what_is_kept_still_passes(kind: str) -> None:
    checks = {"image": [picture], "multipart": [partial(form, cuts=[1, 50])], "ndjson": [line, body]}[kind]
    assert len(seeds(kind)) >= 7
    for data in seeds(kind):
        for check in checks:
            check(data)


# Images


def picture(data: bytes) -> None:
    """Pixels, or a refusal of one sentence, soon."""
    began = time.process_time()
    try:
        pixels = resize_and_crop(decode(data, max_pixels=MAX_PIXELS), Preprocessing.evaluation(64))
        assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    except ImageError as error:
        assert str(error).endswith(".")
        assert "\n" not in str(error)
    assert time.process_time() - began < MAX_SECONDS


SMALL = [path.read_bytes() for path in sorted(PICTURES.glob("*/*.*")) if path.stat().st_size < 20_000]


def test_an_image_is_decoded_or_refused_in_bounded_memory() -> None:
    @fuzzed(250)
    @given(mutated([*SMALL, *seeds("image")]))
    def check(data: bytes) -> None:
        kept("image", data, picture)

    before = peak(reset=True)
    check()
    assert peak() - before < MAX_MEMORY


def peak(*, reset: bool = False) -> int:
    """Bytes that this process held at most, of all time or from now on; 0 where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# Containers


def container(data: bytes) -> None:
    """A refusal of one sentence, or a cost and Pillow's size."""
    try:
        read = inspect(data)
    except ImageError as error:
        assert str(error).endswith(".")
        return
    assert 0 <= read.decode_cost < float("inf")
    try:
        image = Image.open(io.BytesIO(data), formats=(read.format,))
    except Exception:  # what Pillow refuses has no size
        return
    assert (read.width, read.height) == image.size or fails_to_load(image)


def fails_to_load(image: Image.Image) -> bool:
    """Whether an image has a size, and no pixels."""
    try:
        image.load()
    except Exception:
        return True
    return False


@fuzzed(400)
@given(mutated([*SMALL, *seeds("image")]))
def test_a_container_is_read_as_pillow_reads_it(data: bytes) -> None:
    kept("image", data, container)


SEGMENTS = st.tuples(st.integers(0xC0, 0xFE), st.binary(max_size=60), st.sampled_from((b"", b"\xff", b"\0", b"\xff\0")))
CHUNKS = st.tuples(
    st.sampled_from((b"IDAT", b"iCCP", b"zTXt", b"eXIf", b"fcTL", b"acTL", b"prVt")), st.binary(max_size=60)
)


@fuzzed(200)
@given(st.lists(SEGMENTS, max_size=20))
def test_any_segments_of_a_jpeg_are_read_as_pillow_reads_them(segments: list[tuple[int, bytes, bytes]]) -> None:
    jpeg = (FOUND / "image" / "progressive.jpg").read_bytes()
    middle = b"".join(bytes((255, code)) + (len(body) + 2).to_bytes(2) + body + junk for code, body, junk in segments)
    container(jpeg[:2] + middle + jpeg[2:])


@fuzzed(200)
@given(st.lists(CHUNKS, max_size=20), st.booleans())
def test_any_chunks_of_a_png_are_read_as_pillow_reads_them(chunks: list[tuple[bytes, bytes]], last: bool) -> None:
    png = (FOUND / "image" / "interlaced-exif.png").read_bytes()
    middle = b"".join(
        len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4) for name, body in chunks
    )
    at = len(png) - 12 if last else 33
    container(png[:at] + middle + png[at:])


# Forms

BOUNDARY = st.text("ABCxyz0189'()+_,-./:=?", min_size=1, max_size=70)
NAME = st.text("image abcüß图&=.", min_size=1, max_size=20)


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, bytes]:
    """A content type and a body as clients send it: RFC 7578, with no preamble (refused, and sent by nobody)."""
    boundary, body = draw(BOUNDARY), b""
    for _ in range(draw(st.integers(1, 5))):
        filename = f'; filename="{draw(NAME)}"' if draw(st.booleans()) else ""
        kind = "\r\nContent-Type: image/jpeg" if draw(st.booleans()) else ""
        data = draw(st.binary(max_size=200) | st.sampled_from((b"\r\n", b"\r", b"--", b"\r\n--", b"\n\r\n\r")))
        if f"--{boundary}".encode() in data + b"\r\n":
            data = b""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{draw(NAME)}"{filename}{kind}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return f'multipart/form-data; boundary="{boundary}"', body + f"--{boundary}--\r\n".encode()


def in_pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The same bytes as they might come over a network."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def read_form(content_type: str, pieces: Sequence[bytes], most: int) -> list[Part] | str:
    """The parts, or the code of the refusal."""

    async def read() -> list[Part]:
        return [part async for part in split_form(_arriving(pieces), content_type, most)]

    try:
        return asyncio.run(read())
    except RequestError as error:
        assert error.status == 400
        return error.code


async def _arriving(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def reference(content_type: str, body: bytes) -> list[Part]:
    """What Python's own parser of mail finds in a form."""
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    found = []
    for part in message.get_payload():
        raw = dict(part.raw_items())["Content-Disposition"].encode("ascii", "surrogateescape").decode()
        fields = dict(field.split("=", 1) for field in raw.split("; ")[1:])
        data = part.get_payload(decode=True)[: MAX_PART + 1]
        found.append(Part(fields["name"].strip('"'), "filename" in fields, data))
    return found


CUTS = st.lists(st.integers(0, 10_000), max_size=30)


@fuzzed(120)
@given(forms(), CUTS)
def test_a_form_in_any_pieces_is_read_as_pythons_own_parser_reads_it(sent: tuple[str, bytes], cuts: list[int]) -> None:
    content_type, body = sent
    expected = reference(content_type, body)
    assert read_form(content_type, in_pieces(body, cuts), MAX_PART) == expected
    assert read_form(content_type, [bytes([byte]) for byte in body], MAX_PART) == expected


def form(data: bytes, cuts: list[int]) -> None:
    """Refused, or read alike in any pieces."""
    whole = read_form("multipart/form-data; boundary=x", [data], MAX_PART)
    assert read_form("multipart/form-data; boundary=x", in_pieces(data, cuts), MAX_PART) == whole


@fuzzed(200)
@given(mutated(seeds("multipart")), CUTS)
def test_a_broken_form_is_refused_or_read_alike_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    kept("multipart", data, partial(form, cuts=cuts))


def test_text_before_the_first_boundary_is_refused_however_the_body_is_cut() -> None:
    body = b'\r\nhat\r\n--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nhat\r\n--x--\r\n'
    for cut in range(len(body)):
        assert read_form("multipart/form-data; boundary=x", in_pieces(body, [cut]), MAX_PART) == "malformed_form"


# Lines


def readsplit_lines(pieces: Sequence[bytes], longest: int) -> list[bytes] | str:
    """The lines, or the code of the refusal."""

    async def read() -> list[bytes]:
        return [line async for line in split_lines(_arriving(pieces), longest)]

    try:
        return asyncio.run(read())
    except RequestError as error:
        assert error.status == 413
        return error.code


@fuzzed(200)
@given(mutated(seeds("ndjson")) | st.binary(max_size=300), CUTS)
def test_lines_in_any_pieces_are_the_lines_of_the_whole(data: bytes, cuts: list[int]) -> None:
    def check(body: bytes) -> None:
        *ended, rest = body.split(b"\n")
        assert readsplit_lines(in_pieces(body, cuts), len(body)) == ended + [rest] * bool(rest)

    kept("ndjson", data, check)


KEYS = st.sampled_from(["input", "id", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
JSON_BYTES = JSON.map(lambda value: json.dumps(value).encode())


def line(data: bytes) -> None:
    """An image or a reason, and an id that can be written back."""
    given_ = parse_line(3, data)
    assert isinstance(given_.image, bytes) or (given_.image.status, given_.image.param) == (400, "input[3]")
    assert orjson.loads(json_bytes({"id": given_.id}))["id"] == given_.id


def body(data: bytes) -> None:
    """The same of a whole body of JSON."""
    try:
        sent = decode_inputs(parse_json(data).get("input"), 64)
        assert all(isinstance(image, bytes) or image.status == 400 for image in sent.images)
    except RequestError as error:
        assert error.status in (400, 413)


@fuzzed(300)
@given(mutated(seeds("ndjson")) | st.binary(max_size=60) | JSON_BYTES)
def test_a_line_is_an_image_or_a_reason(data: bytes) -> None:
    kept("ndjson", data, line)
    kept("ndjson", data, body)
