"""Image files on disk: a folder counts as its images, at any depth, sorted."""

from __future__ import annotations

from pathlib import Path

from mixmim_serve.errors import DataError

# By name only, so that listing a million files opens none of them. Content decides later what can be decoded.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
)


def list_images(folder: Path) -> list[Path]:
    """Every image file below a folder, hidden ones left out, sorted by path.

    Raises:
        DataError: when the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one that holds images, at any depth.")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and _visible(path, folder)
    )
    if not found:
        raise DataError(f"{folder} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return found


def expand(paths: list[Path]) -> list[Path]:
    """Files in the order given, each folder replaced by its images.

    Raises:
        DataError: when a path does not exist or a folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files.extend(list_images(path))
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder.")
    return files


def _visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
