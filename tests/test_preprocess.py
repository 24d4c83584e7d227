"""Images good and bad through `mixmim_serve.preprocess`.

Two sets of files: the copy in tests/data/robustness, always, and the full set of the project where it lies beside the
checkout. The other images are made here, so that every expected pixel is known.
"""

from __future__ import annotations

import csv
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from mixmim_serve import heif
from mixmim_serve import preprocess as pre
from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError

# Pillow warns of oddities in a file; they are the file's fault, not a fault of the code under test.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

COMMITTED = Path(__file__).parent / "data" / "robustness"
FULL = Path(__file__).parents[2] / "shared" / "data" / "robustness.tar"
MAX_MEGABYTES, MAX_SECONDS = 500, 5  # what one file of the robustness set may take, the interpreter included


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session", params=["committed", "full"])
def robustness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one robustness set."""
    if request.param == "committed":
        return COMMITTED
    if not FULL.exists():
        pytest.skip(f"the full robustness set is not at {FULL}")
    folder = tmp_path_factory.mktemp("full")
    with tarfile.open(FULL) as tar:
        tar.extractall(folder, filter="data")
    return folder / "robustness"


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def sample(name: str) -> bytes:
    return (COMMITTED / name).read_bytes()


def photo(name: str = "gen__jpeg_baseline.jpg") -> Image.Image:
    return pre.decode(sample(f"good/{name}"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin, so whoever decodes them finds it truncated."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + b"\0\0\1\0IDAT"


def tiff(pixels: bytes, *tags: tuple[int, int, int, int], big: bool = False) -> bytes:
    """A little-endian 16 x 16 grey TIFF; `tags` (tag, type, count, value) replace or follow the usual ones."""
    head = (
        b"II+\0\x08\0\0\0" + struct.pack("<Q", 16 + len(pixels))
        if big
        else b"II*\0" + struct.pack("<I", 8 + len(pixels))
    )
    usual = ((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, len(head)))
    table = {tag[0]: tag for tag in (*usual, (278, 4, 1, 16), (279, 4, 1, len(pixels)), *tags)}
    entries = b"".join(struct.pack("<HHQQ" if big else "<HHII", *table[number]) for number in sorted(table))
    return head + pixels + struct.pack("<Q" if big else "<H", len(table)) + entries + bytes(8)


# --- the robustness sets ---


def test_good_files_decode_and_bad_ones_are_refused(robustness: Path) -> None:
    failures = [failure for row in manifest(robustness) if (failure := misjudged(robustness, row))]
    assert not failures, "\n".join(failures)


def misjudged(folder: Path, row: dict[str, str]) -> str | None:
    """What went wrong with one file, or None."""
    wanted = "image" if row["kind"] == "good" else "refusal"
    if row["exotic_format"] == "yes" and row["kind"] == "good":
        wanted = "UnsupportedImageError"
    if row["odd"].startswith(("valid HEIF", "valid HEIC")) and heif.is_installed():
        wanted = "any image"  # the manifest has no size of those
    try:
        image = pre.decode((folder / row["file"]).read_bytes())
        found = f"{image.mode} {image.width}x{image.height}"
        right = wanted == "any image" or (wanted == "image" and found == f"RGB {row['upright_size']}")
    except ImageError as error:
        found = f"{type(error).__name__}: {error}"
        right = is_one_sentence(str(error)) and (wanted == "refusal" or wanted == type(error).__name__)
    return None if right else f"{row['file']} ({row['odd']}): wanted {wanted}, got {found}"


def is_one_sentence(message: str) -> bool:
    return bool(re.fullmatch(r"[^\n]+[A-Za-z0-9]\.", message)) and not re.search(r"0x|<_io|/|Error", message)


def test_no_file_takes_much_memory_or_time(robustness: Path) -> None:
    """The peak of a process that reads them all bounds the peak of each.

    The peak is VmHWM, for `ru_maxrss` is inherited from the parent on Linux and would show pytest's own memory.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", PROBE, robustness], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["files"] == len(manifest(robustness))
    assert report["megabytes"] <= MAX_MEGABYTES
    assert report["seconds"] <= MAX_SECONDS, report["slowest"]


PROBE = """
import json, re, sys, time
from pathlib import Path
from mixmim_serve import config, errors, preprocess
seconds = {}
for path in (path for path in Path(sys.argv[1]).glob("*/*") if path.parent.name in ("good", "bad")):
    start = time.process_time()
    try:
        preprocess.preprocess(preprocess.read_limited(path), config.Preprocessing())
    except errors.ImageError:
        pass
    seconds[path.name] = time.process_time() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
slowest = max(seconds, key=seconds.get)
print(json.dumps(dict(files=len(seconds), megabytes=peak, slowest=slowest, seconds=seconds[slowest])))
"""


def test_damaged_bytes_never_raise_anything_but_image_errors() -> None:
    chance = np.random.default_rng(0)
    for row in manifest(COMMITTED) * 4:
        data = np.frombuffer(sample(row["file"]), np.uint8).copy()
        if data.size:
            data[(data.size * chance.random(4) ** 3).astype(int)] = chance.integers(0, 256, 4)  # mostly in the header
        assert is_one_sentence(refusal(data.tobytes()) or "none.")


def refusal(data: bytes) -> str | None:
    try:
        pre.decode(data, max_pixels=1_000_000)
    except ImageError as error:
        return str(error)
    return None


# --- what is refused, and in which words ---


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", UndecodableImageError, "empty"),
        (sample("bad/gen__trunc_90.jpg"), UndecodableImageError, "JPEG image is truncated"),
        (sample("bad/gen__trunc_10.png"), UndecodableImageError, "PNG image is truncated"),
        (sample("bad/gen__sig_only.png"), UndecodableImageError, "PNG image is damaged"),
        (sample("bad/gen__trunc_50_lossless.webp"), UndecodableImageError, "WEBP image is damaged"),
        (b"no image", UnsupportedImageError, "TIFF, BMP, AVIF or HEIC"),
        (sample("bad/gen__xxe.svg"), UnsupportedImageError, "JPEG, PNG, WEBP"),
        (sample("good/pillow__hopper.ico"), UnsupportedImageError, "not an image of an accepted format"),
        (b"%PDF-1.7\n", UnsupportedImageError, "not an image of an accepted format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", UnsupportedImageError, "not an image of an accepted format"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1jpeg", UnsupportedImageError, "not an image of an accepted format"),
        (sample("bad/gen__bomb_60000x60000.bmp"), ImageTooLargeError, "60000 x 60000 pixels, the limit is 64,000,000"),
        (sample("bad/gen__bomb_16383x16383.webp"), ImageTooLargeError, "16383 x 16383 pixels, the limit is 64,000,000"),
        (b"\xff" * 20_000_001, ImageTooLargeError, "20,000,001 bytes, the limit is 20,000,000"),
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, kind: type[ImageError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        pre.decode(data)
    assert is_one_sentence(str(caught.value))


def test_too_many_pixels_are_refused_before_any_is_decoded() -> None:
    with pytest.raises(ImageTooLargeError, match="8001 x 8000 pixels, the limit is 64,000,000"):
        pre.decode(png_header(8001, 8000))
    with pytest.raises(UndecodableImageError, match="truncated"):  # the same file within the limit is decoded
        pre.decode(png_header(80, 80))


def test_a_bomb_is_refused_whether_pillow_warns_or_raises() -> None:
    bomb = png_header(10_000, 10_000)
    with pytest.raises(ImageTooLargeError, match="10000 x 10000 pixels, the limit is 64,000,000"):
        pre.decode(bomb)
    with pytest.raises(ImageTooLargeError, match="more than the limit of 200,000,000"):  # the warning is an error here
        pre.decode(bomb, max_pixels=200_000_000)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UndecodableImageError, match="truncated"):
        pre.decode(bomb, max_pixels=200_000_000)


def test_limits_can_be_set_and_are_inclusive() -> None:
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    assert pre.decode(data, max_bytes=len(data), max_pixels=200).size == (20, 10)
    with pytest.raises(ImageTooLargeError, match="20 x 10"):
        pre.decode(data, max_pixels=199)
    with pytest.raises(ImageTooLargeError, match=f"limit is {len(data) - 1}"):
        pre.decode(data, max_bytes=len(data) - 1)


def test_tiff_tiles_count_against_the_pixel_limit() -> None:
    tiles = ((322, 4, 1, 16_000), (323, 4, 1, 16_000), (324, 4, 1, 8), (325, 4, 1, 256))
    with pytest.raises(ImageTooLargeError, match="tile of the image has 16000 x 16000"):
        pre.decode(tiff(bytes(256), *tiles, (259, 3, 1, 8)))


@pytest.mark.parametrize("big", [False, True])
def test_tiff_tables_are_limited(big: bool) -> None:
    assert pre.decode(tiff(bytes(256), (273, 4, 1, 16 if big else 8), big=big)).size == (16, 16)
    strips = bytes(4 * 300_001)
    with pytest.raises(UndecodableImageError, match="300,001 numbers"):
        pre.decode(tiff(strips, (273, 4, 300_001, 8), (278, 4, 1, 1), big=big))


def test_jpeg_scans_are_limited() -> None:
    data = encoded(Image.new("RGB", (16, 16), "red"), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert pre.decode(data[:-2] + scan * 3 + data[-2:]).size == (16, 16)
    with pytest.raises(UndecodableImageError, match="more than 64 scans"):
        pre.decode(data[:-2] + scan * 55 + data[-2:])


PILLOW_RAISES = (
    *(OSError, ValueError, SyntaxError, NotImplementedError, struct.error, zlib.error, EOFError, IndexError, KeyError),
    *(TypeError, OverflowError, AttributeError, RuntimeError, ZeroDivisionError, UnidentifiedImageError),
)


@pytest.mark.parametrize("kind", PILLOW_RAISES)
@pytest.mark.parametrize("where", ["open", "load"])
def test_any_exception_of_pillow_becomes_ours(
    kind: type[Exception], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("<_io.BytesIO object at 0x7f00> /some/path")

    monkeypatch.setattr(Image if where == "open" else ImageFile.ImageFile, where, fail)
    with pytest.raises(UndecodableImageError, match="damaged") as caught:
        pre.decode(encoded(Image.new("RGB", (4, 4)), "BMP"))
    assert is_one_sentence(str(caught.value))


def test_no_memory_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageTooLargeError, match="more memory than is available"):
        pre.decode(encoded(Image.new("RGB", (4, 4)), "BMP"))


# --- pixel modes ---


def decoded(image: Image.Image, name: str = "PNG", **options: object) -> list[list[int]]:
    """[red, green, blue] of each pixel after a round trip through a file."""
    result = pre.decode(encoded(image, name, **options))
    assert result.mode == "RGB"
    return np.asarray(result).reshape(-1, 3).tolist()


def grey(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


def row_of(*values: object, dtype: type[np.generic] | str = np.uint8) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def test_alpha_is_dropped_and_the_colour_below_stays() -> None:
    rgba = row_of((10, 20, 30, 0), (200, 1, 2, 128))
    assert decoded(rgba) == [[10, 20, 30], [200, 1, 2]]
    assert decoded(rgba, "WEBP", lossless=True, exact=True) == [[10, 20, 30], [200, 1, 2]]
    assert decoded(row_of((10, 0), (200, 128))) == grey(10, 200)


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_a_palette_loses_its_transparency(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 1, 2])
    image.putpixel((1, 0), 1)
    assert decoded(image, transparency=transparency) == [[10, 20, 30], [200, 1, 2]]


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_high_byte(name: str) -> None:
    levels = row_of(0, 255, 256, 32768, 65535, dtype=np.uint16)
    assert levels.mode == "I;16"
    assert decoded(levels, name) == grey(0, 0, 1, 128, 255)


def test_sixteen_bits_of_a_big_endian_tiff_keep_the_high_byte() -> None:
    levels = row_of(0, 256, 65535, dtype=">u2")
    assert levels.mode == "I;16B"
    assert decoded(levels, "TIFF") == grey(0, 1, 255)


def test_sixteen_bit_grey_looks_like_its_eight_bit_twin() -> None:
    assert mean_difference(photo("gen__png_grey16.png"), photo().convert("L").convert("RGB")) < 8


def test_twelve_bits_keep_their_upper_eight() -> None:
    packed = b"".join((value << 12 | value).to_bytes(3, "big") for value in range(0, 4096, 32))  # pairs of one value
    pixels = np.asarray(pre.decode(tiff(packed, (258, 3, 1, 12))))
    assert pixels[..., 0].ravel().tolist() == [value >> 4 for value in range(0, 4096, 32) for _ in range(2)]


def test_integers_and_floats_are_stretched_over_their_finite_range() -> None:
    assert decoded(row_of(-100, 0, 100, dtype=np.int32), "TIFF") == grey(0, 128, 255)
    values = row_of(np.nan, -np.inf, 2, 3, 4, np.inf, dtype=np.float32)
    assert decoded(values, "TIFF") == grey(0, 0, 0, 128, 255, 255)
    assert decoded(row_of(7, 7, dtype=np.float32), "TIFF") == grey(0, 0)
    assert decoded(row_of(np.nan, np.inf, dtype=np.float32), "TIFF") == grey(0, 0)
    assert decoded(row_of(-3e38, 0, 3e38, dtype=np.float32), "TIFF") == grey(0, 0, 0)  # a spread no float32 holds


def test_one_bit_is_black_and_white() -> None:
    assert decoded(Image.fromarray(np.array([[False, True]]))) == grey(0, 255)


def test_cmyk_is_converted_with_adobes_inversion_undone() -> None:
    inks = Image.merge("CMYK", [row_of(*band) for band in ((0, 255, 0), (0, 0, 0), (0, 0, 0), (0, 0, 255))])
    assert decoded(inks, "TIFF") == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    assert mean_difference(photo("gen__jpeg_cmyk.jpg"), photo()) < 4


def test_the_first_frame_counts() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for name in ("GIF", "TIFF", "PNG", "WEBP", "AVIF"):
        pixels = pre.decode(encoded(red, name, save_all=True, append_images=[blue]))
        assert mean_difference(pixels, red) < 2, name


# --- orientation ---


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    """Of 255, over all pixels and channels."""
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean())


@pytest.mark.parametrize(
    "name", [*(f"gen__exif_{number}.jpg" for number in range(2, 9)), "gen__exif_6.avif", "gen__exif_6.webp"]
)
def test_every_orientation_shows_the_same_picture(name: str) -> None:
    reference = photo("gen__exif_1.jpg")
    turned = photo(name)
    assert turned.size == reference.size == (150, 200)
    assert mean_difference(turned, reference) <= 2.2
    assert not turned.getexif()  # so that nobody turns it again


@pytest.mark.parametrize(
    ("name", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_orientation_is_applied_once(name: str, options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise makes it upright; Pillow turns a TIFF by itself
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    turned = np.asarray(pre.decode(encoded(image, name, exif=exif, **options)))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    "exif", [b"\xde\xad" * 40, b"II*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_refuse_an_image(name: str, exif: bytes) -> None:
    assert pre.decode(encoded(Image.new("RGB", (6, 4)), name, exif=b"Exif\0\0" + exif)).size == (6, 4)


# --- resize, crop, normalise ---


def torchvision_like(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """`Resize(int, BICUBIC)` and `CenterCrop(int)` for PIL images, after torchvision 0.28 transforms/functional.py."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = preprocessing.resize_size, int(preprocessing.resize_size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    size = preprocessing.image_size
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


SIZES = [(1, 1), (1, 31), (17, 5), (224, 224), (256, 256), (257, 255), (301, 256), (256, 303), (333, 500), (640, 479)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "preprocessing",
    [Preprocessing(), Preprocessing.evaluation(128), Preprocessing.evaluation(384), Preprocessing(96, 117)],
    ids=lambda preprocessing: f"{preprocessing.resize_size}-{preprocessing.image_size}",
)
def test_resize_and_crop_equal_torchvision(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    image = noise(*size)
    pixels = pre.resize_and_crop(image, preprocessing)
    assert pixels.shape == (preprocessing.image_size, preprocessing.image_size, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, torchvision_like(image, preprocessing))


@pytest.mark.parametrize("size", [(8, 401), (403, 8), (3, 100)])
def test_elongated_images_agree_with_the_plain_way(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(*size).point(lambda level: 64 + level // 2)  # no overshoot to be clipped between the passes
    plain = torchvision_like(image, Preprocessing())
    monkeypatch.setattr(Image.Image, "crop", None)  # the plain way would need it
    assert np.abs(pre.resize_and_crop(image, Preprocessing()).astype(int) - plain).max() <= 2


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_extremely_elongated_images_pass(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    assert (pre.resize_and_crop(image, Preprocessing()) == (10, 20, 30)).all()


def test_normalize_equals_torchvision() -> None:
    pixels = np.asarray(noise(224, 224))
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    values = pre.normalize(pixels, Preprocessing())
    assert values.shape == (3, 224, 224)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.flags.writeable  # torch.from_numpy warns otherwise
    np.testing.assert_allclose(values, ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_denormalize_undoes_normalize_and_clips() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    preprocessing = Preprocessing()
    np.testing.assert_array_equal(pre.denormalize(pre.normalize(pixels, preprocessing), preprocessing), pixels)
    extremes = pre.denormalize(np.full((3, 1, 2), [[-100, 100]], np.float32), preprocessing)
    assert extremes.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_preprocess_is_its_two_steps() -> None:
    preprocessing = Preprocessing.evaluation(128)
    data = sample("good/gen__exif_6.jpg")
    steps = pre.resize_and_crop(pre.decode(data), preprocessing)
    np.testing.assert_array_equal(pre.preprocess(data, preprocessing), steps)


def test_threads_agree_and_leave_pillow_as_it_was() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    good = [row["file"] for row in manifest(COMMITTED) if row["kind"] == "good" and row["exotic_format"] == "no"]

    def run(name: str) -> np.ndarray:
        return pre.preprocess(sample(name), Preprocessing(32, 32))

    with ThreadPoolExecutor(8) as pool:
        for name, values in zip(good, pool.map(run, good), strict=True):
            np.testing.assert_array_equal(values, run(name), err_msg=name)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


# --- files ---


def test_read_limited_reads_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    assert pre.read_limited(path, 5) == pre.read_limited(str(path)) == b"12345"
    with pytest.raises(ImageTooLargeError, match=r"a\.jpg is larger than the limit of 4 bytes"):
        pre.read_limited(path, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a file"),
        (os.mkfifo, "not a file"),  # opening it would block
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_by_name(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "odd.jpg")
    with pytest.raises(ImageError, match=rf"odd\.jpg: .*{words}") as caught:
        pre.read_limited(tmp_path / "odd.jpg")
    assert "Errno" not in str(caught.value)


def test_a_name_that_cannot_be_is_refused() -> None:
    with pytest.raises(ImageError, match="not a file name"):
        pre.read_limited("a\0b")
