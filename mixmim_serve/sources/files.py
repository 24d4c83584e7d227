"""Image files, in a folder or named in a list."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mixmim_serve.errors import DataError
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, all_or_none, digest_of
from mixmim_serve.sources.names import NAMED_SUFFIXES, readable

MAX_LIST_BYTES = 500_000_000  # some five million lines
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "url")  # columns, best first


@dataclass(frozen=True)
class FileSource:
    """One file per image. The key is its name relative to `folder`, or an absolute path or URL."""

    name: str
    folder: str  # ends with a slash; empty for the working directory
    keys: Sequence[str]
    labels: Sequence[str] | None
    odd: Mapping[str, str] = field(default_factory=dict)  # names that are not UTF-8 by their keys
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def runs(self) -> Sequence[range]:
        """One run: no order is cheaper than another."""
        return (range(len(self.keys)),)

    @property
    def places(self) -> Iterable[str]:
        """See `Source.places`."""
        return map(self._place, self.keys)

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return storage.read_image(self._place(self.keys[index]))

    def check(self, index: int) -> None:
        """See `Source.check`; images with absolute paths or URLs have no common folder to check."""
        if self._place(self.keys[index]) != self.keys[index] and not storage.is_folder(self.folder or "."):
            raise DataError(f"{self.name} no longer exists: restore it, and run again.")

    def digest(self) -> str:
        """See `Source.digest`; sizes are those of local files."""
        places = (self._place(key) for key in self.keys)
        return digest_of(self.keys, (b"%d " % storage.local_size(place) for place in places))

    def _place(self, key: str) -> str:
        key = self.odd.get(key, key)
        return storage.from_spec(key) if storage.is_url(key) or os.path.isabs(key) else self.folder + key


def open_folder(
    name: str, folder: str, names: Sequence[str], passed_over: Mapping[str, int] | None = None
) -> FileSource:
    """A source of these images of a folder; the first subfolder is the label."""
    spelt = readable(names)
    keys = tuple(spelt.values())
    labels = all_or_none(key.partition("/")[0] if "/" in key else None for key in keys)
    odd = {key: name for name, key in spelt.items() if key != name}
    return FileSource(name, storage.join(folder, ""), keys, labels, odd, passed_over or {})


def open_list(name: str, places: Sequence[str]) -> FileSource:
    """A source of the images in a .txt, .csv or .tsv file: one per line, with a label after a tab or comma.

    Paths are relative to the list. Blank lines and lines that start with # are skipped; a header (`path,label`) selects
    the columns. A missing file is reported when it is read.

    Raises:
        DataError: several lists, not text, no images, or a duplicate image.
    """
    if len(places) > 1:
        raise DataError(f"{name} matches {len(places)} lists: combine them into one.")
    labels: dict[str, str | None] = {}
    for path, label in _rows(places[0]):
        if path in labels:
            raise DataError(f"{name} lists {path} twice: list each image once.")
        labels[path] = label
    if not labels:
        raise DataError(
            f"{name} lists no images: expected a path per line, optionally with a tab or comma and a label."
        )
    keys = tuple(sorted(labels))
    return FileSource(name, storage.folder_of(places[0]), keys, all_or_none(labels[key] for key in keys))


def _rows(place: str) -> list[tuple[str, str | None]]:
    """Path and label of each line."""
    with storage.translated_errors(place, DataError):
        with storage.open_binary(place) as file:
            text = file.read(MAX_LIST_BYTES + 1)
        if len(text) > MAX_LIST_BYTES:
            raise DataError(f"{place} has more than {MAX_LIST_BYTES:,} bytes: name fewer images, or use .tar files.")
        lines = [line.rstrip("\r") for line in text.decode("utf-8-sig").split("\n")]
        rows = _cells(place, [line for line in lines if line.strip() and not line.lstrip().startswith("#")])
    path, label = 0, 1
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    path_columns = [header.index(name) for name in PATH_NAMES if name in header]
    if path_columns and not any(_is_image(cell) for cell in header):  # `a.jpg,file` is an image of the class "file"
        path = path_columns[0]
        label = next((header.index(name) for name in LABEL_NAMES if name in header), len(header))
        rows = rows[1:]
    pairs = [(row[path].strip(), row[label].strip() if label < len(row) else None) for row in rows if path < len(row)]
    return [(name, text) for name, text in pairs if name]


def _cells(place: str, lines: Sequence[str]) -> list[list[str]]:
    suffix = os.path.splitext(storage.without_query(place))[1].lower()
    if suffix != ".txt":
        return list(csv.reader(lines, delimiter="," if suffix == ".csv" else "\t"))
    return [
        line.split("\t") if "\t" in line else [line] if _is_image(line) else line.rsplit(",", 1) for line in lines
    ]  # a comma may be part of a file name


def _is_image(name: str) -> bool:
    return os.path.splitext(name.strip())[1].lower() in NAMED_SUFFIXES
