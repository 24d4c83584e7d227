"""HEIC with and without its package: what is read, how it is turned, and what is passed over."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from heic_files import Heic, Item, configuration, grid, sequence_parameters, size_box, slice_unit
from pictures import photo
from PIL import Image
from typer.testing import CliRunner, Result

from mixmim_serve import heif
from mixmim_serve.cli import app
from mixmim_serve.containers import inspect
from mixmim_serve.containers.hevc import unit
from mixmim_serve.errors import DataError, ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from mixmim_serve.preprocess import decode
from mixmim_serve.sources import open_source
from mixmim_serve.sources.names import expand
from mixmim_serve.sources.passed_over import counted, sentence

if TYPE_CHECKING:
    from serving import TestClient

KEPT = Path(__file__).parent / "data" / "heic" / "photo.heic"  # written by pillow-heif: photo(7, 64, 48), quality 50
needs_package = pytest.mark.skipif(not heif.is_installed(), reason="needs the extra heif")


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: False)


@pytest.fixture
def inspecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers are looked at whether or not the package is there."""
    monkeypatch.setattr(heif, "require", lambda: None)


def encoded(image: Image.Image, **options: object) -> bytes:
    package = heif.load()
    package.register_heif_opener()
    try:
        stream = io.BytesIO()
        image.save(stream, "HEIF", **options)
        return stream.getvalue()
    finally:
        package.unregister_heif_opener() if hasattr(package, "unregister_heif_opener") else Image.SAVE.pop("HEIF", None)


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def mixmim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Reading


@needs_package
def test_the_kept_file_is_the_photo_that_it_was_made_of() -> None:
    image = decode(KEPT.read_bytes())
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert difference(image, photo(7, 64, 48)) < 8


@needs_package
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = photo(1, 90, 60).convert(mode)
    found = decode(encoded(image, quality=95, chroma=444))
    assert difference(found, image.convert("RGB")) < 4


@needs_package
def test_a_grid_of_tiles_is_read_as_one_image() -> None:
    image = photo(2, 300, 200)
    data = encoded(image, quality=95, tile_size=64)
    assert data.count(b"infe") > 15
    container = inspect(data)
    assert (container.format, container.width, container.height) == ("HEIC", 300, 200)
    assert difference(decode(data), image) < 4
    assert container.decode_cost < 3 * inspect(encoded(image, quality=95)).decode_cost


@needs_package
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_once(orientation: int) -> None:
    """Cameras write the turn as a property and as Exif; only the first counts."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(3, 96, 64)
    data = encoded(image, quality=95, exif=exif.tobytes())
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=95, exif=exif.tobytes())
    found = decode(data)
    assert difference(found, decode(jpeg.getvalue())) < 5
    container = inspect(data)
    assert (container.width, container.height) == found.size


@needs_package
def test_exif_alone_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(3, 96, 64)
    data = encoded(image, quality=95, exif=exif.tobytes())
    turn = data.index(b"irot") + 4
    unturned = data[:turn] + b"\0" + data[turn + 1 :]
    assert decode(unturned).size == (96, 64)


@needs_package
def test_ten_bits_a_channel_become_eight() -> None:
    package = heif.load()
    ramp = np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64)
    file = package.from_bytes("RGB;16", (64, 48), np.stack([ramp] * 3, axis=2).tobytes())
    stream = io.BytesIO()
    file.save(stream, quality=95, chroma=444)
    found = np.asarray(decode(stream.getvalue()), np.float32)
    assert np.abs(found - (ramp >> 8)[:, :, None]).mean() < 4


@needs_package
def test_every_truncation_is_an_image_error() -> None:
    data = KEPT.read_bytes()
    for end in range(0, len(data), 7):
        with pytest.raises(ImageError):
            decode(data[:end])


@needs_package
def test_damage_is_an_image_error_or_an_image() -> None:
    data, rng = KEPT.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(ImageError):
            assert decode(bytes(damaged)).mode == "RGB"


def test_the_sizes_of_sequence_parameters_are_read() -> None:
    for size in ((64, 48), (4032, 3024), (1, 1), (65_535, 8)):
        for layers in (0, 1, 3):
            assert unit(sequence_parameters(*size, layers=layers)).size == size


def test_a_photo_of_a_phone_costs_what_its_tiles_and_canvas_do(inspecting: None) -> None:
    """48 tiles of 512 pixels under a canvas of 4032 x 3024, turned by a quarter, with a depth map beside it."""
    tiles = range(2, 50)
    items = [Item(b"grid", grid(6, 8, 4032, 3024), (1, 3), tiles)]
    items += [Item(b"hvc1", slice_unit(size=10_000), (2, 4)) for _ in tiles]
    items += [Item(b"hvc1", slice_unit(), (5, 4), auxiliary_of=(1,))]
    properties = [size_box(4032, 3024), size_box(512, 512), b"\0\0\0\x09irot\1",
                  configuration(sequence_parameters(512, 512)), size_box(768, 576)]  # fmt: skip
    container = inspect(Heic(items, properties).data())
    assert (container.width, container.height) == (3024, 4032)
    pixels = 4032 * 3024 / 4 + 48 * 512 * 512 + 768 * 576
    assert container.decode_cost == pytest.approx(4 * pixels + 19 * 48 * 10_000, rel=0.02)


def test_an_old_libheif_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        libheif_version = staticmethod(lambda: "1.23.0")

    monkeypatch.setattr(heif, "is_installed", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", Package())
    with pytest.raises(UnsupportedImageError, match=r"libheif 1.23.4 or newer, found 1.23.0, which has known holes"):
        heif.load.__wrapped__()


def test_without_the_package_one_sentence_names_the_extra(without_package: None) -> None:
    with pytest.raises(UnsupportedImageError, match=r"not read here: run pip install 'mixmim-serve\[heif\]'"):
        decode(KEPT.read_bytes())


def test_limits_are_those_of_other_formats(inspecting: None) -> None:
    def file(width: int, height: int, coded: tuple[int, int] = (64, 64)) -> bytes:
        properties = [size_box(width, height), configuration(sequence_parameters(*coded))]
        return Heic([Item(b"hvc1", slice_unit(), (1, 2))], properties).data()

    assert inspect(file(8000, 8000)).width == 8000
    for data in (file(8000, 8001), file(64, 64, (8000, 8001))):
        with pytest.raises(ImageTooLargeError, match="the limit is 64,000,000 in all"):
            inspect(data)
    with pytest.raises(ImageTooLargeError, match="the limit of a side is 65,535"):
        inspect(file(65_536, 1))
    with pytest.raises(ImageTooLargeError, match="the limit is 1,000 in all"):
        inspect(file(64, 64), max_pixels=1000)


@pytest.mark.parametrize(
    ("start", "format_"),
    [
        (b"ftypheic", "HEIC"),
        (b"ftypheix", "HEIC"),
        (b"ftypmif1\0\0\0\0miafheic", "HEIC"),
        (b"ftypmif1\0\0\0\0miafavif", "AVIF"),
        (b"ftypmif1\0\0\0\0miafjpeg", None),
        (b"ftypqt  ", None),
    ],
)
def test_brands_tell_the_formats_apart(start: bytes, format_: str | None, inspecting: None) -> None:
    from mixmim_serve.containers import identify

    data = b"\0\0\0\x18" + start + bytes(16)
    if format_ is None:
        with pytest.raises(UnsupportedImageError):
            identify(data)
    else:
        assert identify(data) == format_


# Passing over


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two photos, and files of every kind that is not read."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number in range(10):
        photo(number).save(folder / "trip" / f"{number}.jpg")
    for name in ("a.HEIC", "trip/b.heic", "c.mov", "d.nef", "notes.txt", "psd.psd", ".hidden.heic"):
        (folder / name).write_bytes(KEPT.read_bytes())
    return folder


WITHOUT = (
    "passed over 6 files: .heic (2; pip install 'mixmim-serve[heif]'), .mov (1; video), "
    ".nef (1; raw photo: develop it to JPEG), .txt (1), .psd (1; save it as PNG)"
)


def test_whatever_is_passed_over_is_counted_and_named(mixed: Path, without_package: None) -> None:
    source = open_source(mixed)
    assert len(source.keys) == 10
    assert sentence(source.passed_over) == sentence(expand([mixed])[1])
    assert sorted(sentence(source.passed_over).split(": ", 1)[1].split("), ")) == sorted(
        WITHOUT.split(": ", 1)[1].split("), ")
    )
    assert sentence({}) == ""
    assert sentence(counted(["README"])) == "passed over 1 file: without a suffix (1)"


def test_check_extract_and_embed_name_it(mixed: Path, without_package: None, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # which check needs
    checked = mixmim("check", mixed)
    assert checked.exit_code == 0, checked.output
    assert "passed over 6 files: .heic (2; pip install 'mixmim-serve[heif]')" in checked.stdout
    report = json.loads(mixmim("check", mixed, "--json").stdout)
    assert report["train"]["passed_over"][".heic"] == 2
    embedded = mixmim("embed", "tiny", mixed, "--output", tmp_path / "e.npy")
    assert embedded.exit_code == 0, embedded.output
    assert "passed over 6 files: .heic (2; " in embedded.stderr
    assert np.load(tmp_path / "e.npy").shape[0] == 10
    extracted = mixmim("extract", "tiny", mixed, tmp_path / "features")
    assert extracted.exit_code == 0, extracted.output
    assert "passed over 6 files: .heic (2; " in extracted.stderr
    assert "10 rows for 10 images" in extracted.stdout


def test_members_of_an_archive_are_named_too(mixed: Path, without_package: None, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(mixed, "photos")
    passed = open_source(tmp_path / "photos.tar").passed_over
    assert passed == {".heic": 2, ".mov": 1, ".nef": 1, ".txt": 1, ".psd": 1}


def test_a_folder_of_nothing_else_says_what_it_has(without_package: None, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(KEPT.read_bytes())
    for attempt in (lambda: open_source(tmp_path), lambda: expand([tmp_path])):
        with pytest.raises(DataError, match=r"passed over 1 file: .heic \(1; pip install 'mixmim-serve\[heif\]'\)"):
            attempt()


@needs_package
def test_with_the_package_heic_is_an_image_like_others(mixed: Path) -> None:
    source = open_source(mixed)
    assert len(source.keys) == 12
    assert ".heic" not in source.passed_over
    assert decode(source.read(source.keys.index("a.HEIC"))).size == (64, 48)


# Serving


@needs_package
def test_the_server_reads_it(client: TestClient) -> None:
    response = client.post("/embed", content=KEPT.read_bytes(), headers={"Content-Type": "image/heic"})
    assert response.status_code == 200, response.text
    jpeg = io.BytesIO()
    decode(KEPT.read_bytes()).save(jpeg, "PNG")
    other = client.post("/embed", content=jpeg.getvalue(), headers={"Content-Type": "image/png"})
    one, two = (np.array(each.json()["embedding"]) for each in (response, other))
    assert np.allclose(one, two, atol=1e-5)


@needs_package
def test_a_large_one_is_decoded_in_a_process(client: TestClient) -> None:
    data = encoded(photo(5, 900, 700), quality=60)
    assert inspect(data).decode_cost > 1e6
    response = client.post("/embed", content=data, headers={"Content-Type": "image/heic"})
    assert response.status_code == 200, response.text


def test_without_the_package_the_server_answers_415(client: TestClient, without_package: None) -> None:
    response = client.post("/embed", content=KEPT.read_bytes(), headers={"Content-Type": "image/heic"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_image"
    assert "mixmim-serve[heif]" in response.json()["error"]["message"]


def test_the_size_of_a_file_that_announces_more_is_not_believed(inspecting: None) -> None:
    properties = [size_box(16, 16), configuration(sequence_parameters(9000, 9000))]
    with pytest.raises(ImageTooLargeError, match="a picture of the image has 9000 x 9000 pixels"):
        inspect(Heic([Item(b"hvc1", slice_unit(), (1, 2))], properties).data())
    properties = [size_box(16, 16), configuration(sequence_parameters(16, 16))]
    hidden = sequence_parameters(9000, 9000)
    content = len(hidden).to_bytes(4, "big") + hidden + slice_unit()
    with pytest.raises(ImageTooLargeError, match="a picture of the image has 9000 x 9000 pixels"):
        inspect(Heic([Item(b"hvc1", content, (1, 2))], properties).data())
    with pytest.raises(UndecodableImageError):
        inspect(Heic([], []).data())
