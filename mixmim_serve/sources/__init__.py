"""Where images come from: a folder, tar shards, Parquet files or a list of paths, on disk or behind a URL.

    folder             images at any depth; the first folder below it is the label
    .tar               shards in the layout of WebDataset                                    sources/tar.py
    .parquet           a column of encoded images, as Hugging Face datasets have             sources/parquet.py
    .txt .csv .tsv     a path or URL a line, with a label behind a tab or comma              sources/files.py

One file, a pattern (`train-{000..127}.tar`, `data/*.parquet`, `photos/**/*.jpg`), or a folder that holds only .tar or
.parquet files.
A URL (`s3://`, `gs://`, `https://`, `memory://`) needs fsspec and the package for its kind.
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
    """The images that a folder, file, pattern or URL means; see the module.

    Raises:
        DataError: nothing there, nothing usable in it, or a kind that cannot be read.
    """
    name, place = str(spec), storage.from_spec(spec)
    if storage.has_wildcards(place):
        return _open_pattern(name, storage.expand(place))
    if storage.is_url(place):
        is_folder = not storage.bare(place).lower().endswith((*_OPENERS, *_COMPRESSED))
    elif local.exists(place):
        is_folder = local.is_folder(place)
    else:
        raise DataError(f"{name}: no such file or folder.")
    return _open_folder(name, place) if is_folder else _open_files(name, [place])


def _open_folder(name: str, folder: str) -> Source:
    """Its images if there are any, else its shards."""
    names = storage.list_files(folder)
    if images := [file for file in names if is_image_name(file)]:
        return open_folder(name, folder, images)
    shards = [storage.below(folder, file) for file in names if file.lower().endswith((*_SHARDS, *_COMPRESSED))]
    if not shards:
        raise DataError(f"{name} holds no images, and no .tar or .parquet files: expected {_EXPECTED}.")
    return _open_files(name, shards)


def _open_pattern(name: str, places: Sequence[str]) -> Source:
    """Images as if their common folder held nothing else; without any, the files that they come in."""
    if not any(is_image_name(storage.bare(place).rpartition("/")[2]) for place in places):
        return _open_files(name, places)
    names = storage.short_names(places)
    folder = places[0][: len(storage.bare(places[0])) - len(names[0])]
    found = [short for short in names if is_image_name(short)]
    return open_folder(name, folder or "./", sorted(found, key=lambda short: short.split("/")))


def _open_files(name: str, places: Sequence[str]) -> Source:
    kinds = sorted({_kind(place) for place in places})
    if len(kinds) > 1:
        raise DataError(f"{name} mixes {' and '.join(kinds)} files: give one kind, such as 'folder/*{kinds[0]}'.")
    return _OPENERS[kinds[0]](name, places)


def _kind(place: str) -> str:
    file = storage.bare(place).lower()
    if file.endswith(_COMPRESSED):
        raise DataError(f"{place} is compressed, so images cannot be picked out of it: decompress it to a .tar.")
    for suffix in _OPENERS:
        if file.endswith(suffix):
            return suffix
    raise DataError(f"{place} is no source of images: expected {_EXPECTED}.")
