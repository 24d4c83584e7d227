"""Names of image files: which are images, and the images of a folder, at any depth, sorted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mixmim_serve import heif
from mixmim_serve.errors import DataError
from mixmim_serve.sources.passed_over import counted, sentence

# By name only, so that listing a million files opens none of them. Decoding later goes by content.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
)
NAMED_SUFFIXES = IMAGE_SUFFIXES | frozenset(heif.SUFFIXES)  # of images whether or not they can be read here


def is_image_name(name: str) -> bool:
    """Whether a relative name, with `/` between parts, has the suffix of an image that is read, and no hidden part."""
    return os.path.splitext(name)[1].lower() in image_suffixes() and not is_hidden(name)


def image_suffixes() -> frozenset[str]:
    """The suffixes of images that are read; HEIC is where its package is installed."""
    return NAMED_SUFFIXES if heif.is_installed() else IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether any part of a relative name starts with a dot."""
    return name.startswith(".") or "/." in name


def readable(names: Iterable[str]) -> dict[str, str]:
    """Names as valid text by the names as they are; unique, and most are the same.

    A name that is not UTF-8 (which Python spells with surrogates) gets its odd bytes written as `\\xe9`, and a number
    where another name is spelt like that.
    """
    names = list(names)
    odd = sorted(name for name in names if not _is_text(name))
    taken = set(names).difference(odd) if odd else set()
    found = {name: name for name in names}
    for name in odd:
        text = spelt = as_text(name)
        number = 2
        while spelt in taken:
            stem, suffix = os.path.splitext(text)
            spelt, number = f"{stem}~{number}{suffix}", number + 1
        taken.add(spelt)
        found[name] = spelt
    return found


def as_text(name: str) -> str:
    """A name or message as valid text: bytes that are not UTF-8 are written as `\\xe9`, other surrogates too."""
    escaped = re.sub("[\udc80-\udcff]", lambda odd: f"\\x{ord(odd[0]) - 0xDC00:02x}", name)
    return re.sub("[\ud800-\udfff]", lambda odd: f"\\u{ord(odd[0]):04x}", escaped)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_files(folder: Path) -> list[str]:
    """Relative names of all files in a folder, at any depth but without hidden ones, sorted by folder, then name."""
    names: list[str] = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        relative = Path(directory).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        names.extend(prefix + name for name in files if not is_hidden(name))
    return sorted(names, key=lambda name: name.split("/"))


def list_images(folder: Path) -> list[Path]:
    """All image files in a folder, at any depth but without hidden ones, sorted by path.

    Raises:
        DataError: when the folder is missing or has no images.
    """
    return _split_folder(folder)[0]


def expand(paths: list[Path]) -> tuple[list[Path], dict[str, int]]:
    """The given files in order, with each folder replaced by its images; and what was passed over, by suffix.

    Raises:
        DataError: when a path does not exist or a folder has no images.
    """
    files: list[Path] = []
    others: list[str] = []
    for path in paths:
        if path.is_dir():
            images, passed = _split_folder(path)
            files, others = files + images, others + passed
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder.")
    return files, counted(others)


def _split_folder(folder: Path) -> tuple[list[Path], list[str]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected one with images, at any depth.")
    names = list_files(folder)
    images = [folder / name for name in names if is_image_name(name)]
    if not images:
        passed = sentence(counted(names))
        expected = f"expected files that end in {', '.join(sorted(image_suffixes()))}"
        raise DataError(f"{folder} has no images: {expected}{f'; {passed}' if passed else ''}.")
    return images, [name for name in names if not is_image_name(name)]
