"""Sources of images: a folder, tar shards, Parquet files or a list of paths, on disk or at a URL.

    folder             images at any depth; the first subfolder is the label
    .tar               shards in WebDataset's layout                                          sources/tar.py
    .parquet           a column of encoded images, as Hugging Face datasets have             sources/parquet.py
    .txt .csv .tsv     a path or URL per line, with a label after a tab or comma             sources/files.py

A source is one file, a pattern (`train-{000..127}.tar`, `data/*.parquet`, `photos/**/*.jpg`), or a folder of images or
of .tar or .parquet files. URLs (`s3://`, `gs://`, `https://`, `memory://`) need fsspec and its package for the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mixmim_serve.errors import DataError
from mixmim_serve.sources import local, storage
from mixmim_serve.sources.base import Source, fingerprint
from mixmim_serve.sources.files import open_folder, open_list
from mixmim_serve.sources.names import is_image_name
from mixmim_serve.sources.parquet import open_parquet
from mixmim_serve.sources.passed_over import counted, sentence
from mixmim_serve.sources.tar import open_tar

__all__ = ["Source", "fingerprint", "open_source"]

_OPENERS: dict[str, Callable[[str, Sequence[str]], Source]] = {
    ".tar": open_tar,
    ".parquet": open_parquet,
    ".txt": open_list,
    ".csv": open_list,
    ".tsv": open_list,
}
_SHARDS = (".tar", ".parquet")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_EXPECTED = "a folder of images, .tar or .parquet files, or a .txt, .csv or .tsv list of paths"


def open_source(spec: str | Path) -> Source:
    """Open a folder, file, pattern or URL as a source; see the module.

    Raises:
        DataError: it does not exist, has no images, or is of a kind that cannot be read.
    """
    name, place = str(spec), storage.from_spec(spec)
    if storage.has_wildcards(place):
        return _open_pattern(name, storage.expand(place))
    if storage.is_url(place):
        is_folder = not storage.without_query(place).lower().endswith((*_OPENERS, *_COMPRESSED))
    elif local.exists(place):
        is_folder = local.is_folder(place)
    else:
        raise DataError(f"{name}: no such file or folder.")
    return _open_folder(name, place) if is_folder else _open_files(name, [place])


def _open_folder(name: str, folder: str) -> Source:
    """Open a folder's images if it has any, else its shards."""
    names = storage.list_files(folder)
    passed_over = counted(file for file in names if not is_image_name(file))
    if images := [file for file in names if is_image_name(file)]:
        return open_folder(name, folder, images, passed_over)
    shards = [storage.join(folder, file) for file in names if file.lower().endswith((*_SHARDS, *_COMPRESSED))]
    if not shards:
        passed = f"; {sentence(passed_over)}" if passed_over else ""
        raise DataError(f"{name} has no images and no .tar or .parquet files: expected {_EXPECTED}{passed}.")
    return _open_files(name, shards)


def _open_pattern(name: str, places: Sequence[str]) -> Source:
    """Open the matching images as a folder; without any, open the matching files."""
    if not any(is_image_name(storage.without_query(place).rpartition("/")[2]) for place in places):
        return _open_files(name, places)
    names = storage.short_names(places)
    folder = places[0][: len(storage.without_query(places[0])) - len(names[0])]
    images = [short for short in names if is_image_name(short)]
    passed_over = counted(short for short in names if not is_image_name(short) and "." in short.rpartition("/")[2])
    return open_folder(name, folder or "./", sorted(images, key=lambda short: short.split("/")), passed_over)


def _open_files(name: str, places: Sequence[str]) -> Source:
    kinds = sorted({_kind(place) for place in places})
    if len(kinds) > 1:
        raise DataError(f"{name} mixes {' and '.join(kinds)} files: choose one kind, such as 'folder/*{kinds[0]}'.")
    return _OPENERS[kinds[0]](name, places)


def _kind(place: str) -> str:
    file = storage.without_query(place).lower()
    if file.endswith(_COMPRESSED):
        raise DataError(f"{place} is compressed, so single images cannot be read from it: decompress it to a .tar.")
    for suffix in _OPENERS:
        if file.endswith(suffix):
            return suffix
    raise DataError(f"{place} is not a source of images: expected {_EXPECTED}.")
