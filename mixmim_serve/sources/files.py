"""Images that are files of their own: below a folder, or named in a list."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mixmim_serve.errors import DataError
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, complete, digest_of
from mixmim_serve.sources.names import IMAGE_SUFFIXES, readable

MAX_LIST_BYTES = 500_000_000  # some five million lines
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "url")  # columns, best first


@dataclass(frozen=True)
class FileSource:
    """A file an image. The key is its name below `folder`, or a whole path or URL."""

    name: str
    folder: str  # ends with a slash, or is empty: where this process runs
    keys: Sequence[str]
    labels: Sequence[str] | None
    odd: Mapping[str, str] = field(default_factory=dict)  # names that are not UTF-8 by their keys

    @property
    def runs(self) -> Sequence[range]:
        """One: no order is cheaper than another."""
        return (range(len(self.keys)),)

    @property
    def places(self) -> Iterable[str]:
        """See `Source.places`."""
        return map(self._place, self.keys)

    def read(self, index: int) -> bytes:
        """The encoded image; see `Source.read`."""
        return storage.read_image(self._place(self.keys[index]))

    def check(self, index: int) -> None:
        """See `Source.check`; of images at addresses of their own nothing is known."""
        if self._place(self.keys[index]) != self.keys[index] and not storage.is_folder(self.folder or "."):
            raise DataError(f"{self.name} is no longer there: bring it back, and run again.")

    def digest(self) -> str:
        """See `Source.digest`; sizes are those of local files."""
        places = (self._place(key) for key in self.keys)
        return digest_of(self.keys, (b"%d " % storage.local_size(place) for place in places))

    def _place(self, key: str) -> str:
        key = self.odd.get(key, key)
        return storage.from_spec(key) if storage.is_url(key) or os.path.isabs(key) else self.folder + key


def open_folder(name: str, folder: str, names: Sequence[str]) -> FileSource:
    """The images among a folder's files; the first folder below it is the label."""
    spelt = readable(names)
    keys = tuple(spelt.values())
    labels = complete(key.partition("/")[0] if "/" in key else None for key in keys)
    odd = {key: name for name, key in spelt.items() if key != name}
    return FileSource(name, storage.below(folder, ""), keys, labels, odd)


def open_list(name: str, places: Sequence[str]) -> FileSource:
    """The images that a .txt, .csv or .tsv file names, a line each, with a label behind a tab or comma.

    Paths are relative to the list. Blank lines and those that begin with # are passed over; a first line that names
    the columns (`path,label`) chooses them. A file that is missing is found out when it is read.

    Raises:
        DataError: several lists, no text, no images, or one image twice.
    """
    if len(places) > 1:
        raise DataError(f"{name} means {len(places)} lists: join them to one.")
    found: dict[str, str | None] = {}
    for path, label in _rows(places[0]):
        if path in found:
            raise DataError(f"{name} lists {path} twice: name each image once.")
        found[path] = label
    if not found:
        raise DataError(f"{name} lists no images: expected a path a line, and behind a tab or comma its label.")
    keys = tuple(sorted(found))
    return FileSource(name, storage.folder_of(places[0]), keys, complete(found[key] for key in keys))


def _rows(place: str) -> list[tuple[str, str | None]]:
    """Path and label of each line."""
    with storage.explained(place, DataError):
        with storage.open_binary(place) as file:
            text = file.read(MAX_LIST_BYTES + 1)
        if len(text) > MAX_LIST_BYTES:
            raise DataError(f"{place} has more than {MAX_LIST_BYTES:,} bytes: name fewer images, or use .tar files.")
        lines = [line.rstrip("\r") for line in text.decode("utf-8-sig").split("\n")]
        rows = _cells(place, [line for line in lines if line.strip() and not line.lstrip().startswith("#")])
    path, label = 0, 1
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = [header.index(name) for name in PATH_NAMES if name in header]
    if named and not any(_is_image(cell) for cell in header):  # `a.jpg,file` is an image of the class file
        path = named[0]
        label = next((header.index(name) for name in LABEL_NAMES if name in header), len(header))
        rows = rows[1:]
    found = [(row[path].strip(), row[label].strip() if label < len(row) else None) for row in rows if path < len(row)]
    return [(name, text) for name, text in found if name]


def _cells(place: str, lines: Sequence[str]) -> list[list[str]]:
    suffix = os.path.splitext(storage.bare(place))[1].lower()
    if suffix != ".txt":
        return list(csv.reader(lines, delimiter="," if suffix == ".csv" else "\t"))
    return [
        line.split("\t") if "\t" in line else [line] if _is_image(line) else line.rsplit(",", 1) for line in lines
    ]  # a comma may belong to the name of an image


def _is_image(name: str) -> bool:
    return os.path.splitext(name.strip())[1].lower() in IMAGE_SUFFIXES
