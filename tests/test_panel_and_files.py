"""The panel of a reconstruction, the listing of image files, and files that are whole or not there."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import DataError
from mixmim_serve.files import atomic_path, sha256
from mixmim_serve.panel import CAPTION, GAP, TILES, draw_panel, png
from mixmim_serve.preprocess import normalize
from mixmim_serve.sources.names import expand, list_images

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (17, 34, 51))


@pytest.mark.parametrize(("size", "side"), [(64, 256), (96, 192), (128, 256), (224, 224), (384, 384)])
def test_the_panel_shows_the_five_images_in_a_row(size: int, side: int) -> None:
    preprocessing = Preprocessing.evaluation(size)
    plain = {
        name: normalize(np.full((size, size, 3), colour, np.uint8), preprocessing)
        for name, colour in zip(TILES, COLOURS, strict=True)
    }
    panel = draw_panel(plain, preprocessing)
    assert panel.size == (5 * (side + GAP) + GAP, CAPTION + side + GAP)
    pixels = np.array(panel)
    for number, colour in enumerate(COLOURS):
        left = GAP + number * (side + GAP)
        tile = pixels[CAPTION : CAPTION + side, left : left + side]
        assert (tile == colour).all(), f"tile {number}"
        assert (pixels[:CAPTION, left : left + side] == 0).any(), f"caption {number}"
        assert (pixels[CAPTION:, left - GAP : left] == 255).all(), f"gap before {number}"


def test_a_tile_keeps_every_pixel_of_a_small_image() -> None:
    preprocessing = Preprocessing.evaluation(64)
    original = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    panel = draw_panel(dict.fromkeys(TILES, normalize(original, preprocessing)), preprocessing)
    tile = np.array(panel)[CAPTION : CAPTION + 256, GAP : GAP + 256]
    assert np.array_equal(tile[::4, ::4], original)
    assert np.array_equal(tile, original.repeat(4, axis=0).repeat(4, axis=1))


def test_values_outside_the_range_of_colours_are_clipped() -> None:
    preprocessing = Preprocessing.evaluation(64)
    panel = draw_panel(dict.fromkeys(TILES, np.full((3, 64, 64), 99, np.float32)), preprocessing)
    assert (np.array(panel)[CAPTION : CAPTION + 256, GAP : GAP + 256] == 255).all()


def test_a_png_reads_back() -> None:
    image = Image.effect_noise((30, 20), 50).convert("RGB")
    with Image.open(BytesIO(png(image))) as again:
        assert (again.format, again.tobytes()) == ("PNG", image.tobytes())


def test_atomic_path_puts_a_whole_file_in_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.bin"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent  # a rename within one file system
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == ["file.bin"]


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def stop_half_way() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Image files at any depth among things that are none."""
    names = "b.jpg a.PNG c/z.webp c/a.tif c.gif notes.txt photo .hidden.jpg .git/x.jpg c/.thumbs/y.jpg .cache.jpg/z.jpg"
    root = tmp_path / ".dot" / "images"  # a hidden folder is fine when it is the one that was named
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "folder.jpg").mkdir()
    return root


def test_listing_is_sorted_and_leaves_hidden_files_out(folder: Path) -> None:
    found = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert found == ["a.PNG", "b.jpg", "c/a.tif", "c/z.webp", "c.gif"]


def test_expand_keeps_the_order_given(folder: Path) -> None:
    found, passed_over = expand([folder / "notes.txt", folder / "c", folder / "b.jpg", folder / "c"])
    inside = [folder / "c" / "a.tif", folder / "c" / "z.webp"]
    assert found == [folder / "notes.txt", *inside, folder / "b.jpg", *inside]
    assert passed_over == {}


def test_what_holds_no_images_is_refused(folder: Path) -> None:
    cases = {
        "is not a folder": lambda: list_images(folder / "b.jpg"),
        r"missing is not a folder": lambda: list_images(folder / "missing"),
        r"has no images: expected files that end in \.avif, \.bmp": lambda: list_images(folder / "folder.jpg"),
        r"missing\.jpg: no such file or folder": lambda: expand([folder / "b.jpg", folder / "missing.jpg"]),
        "has no images": lambda: expand([folder / "folder.jpg"]),
    }
    for sentence, call in cases.items():
        with pytest.raises(DataError, match=sentence):
            call()
