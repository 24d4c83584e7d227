"""What is known of images besides their features: labels, folders, columns of single values, a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.sources import Source
from mixmim_serve.sources.files import PATH_NAMES

SAME = 2  # a column with fewer different values tells nothing


@dataclass(frozen=True)
class Column:
    """A value for each image, as text; empty for none."""

    name: str
    values: tuple[str, ...]


def known_columns(features: FeatureFolder, source: Source, rows: Sequence[int], keys: Sequence[str]) -> list[Column]:
    """The columns of these rows that have more than one value: labels, folders, then what the features hold."""
    found = [*_labels(source, keys), *_folders(keys), *_features(features, rows)]
    different: dict[tuple[str, ...], Column] = {}
    for column in found:
        if len(set(column.values)) >= SAME:
            different.setdefault(column.values, column)  # labels are often the names of folders
    return list(different.values())


def read_csv(path: Path, keys: Sequence[str]) -> tuple[list[Column], int]:
    """The columns of a CSV or TSV file for these images, and how many of them it names.

    A row is a path, then any number of values. A header names the columns; without one they are `label`, `label 2` and
    so on. Paths are keys, ends of keys, or longer paths that end in a key. A later row for the same image counts.

    Raises:
        DataError: it is no such file, or names none of the images.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file: expected a path and a label per line, in UTF-8.") from error
    find = _Finder(keys)
    place, names = _header(rows, find)
    values: list[list[str]] = [[""] * len(keys) for _ in names]
    found: set[int] = set()
    for row in rows:
        number = find(row[place]) if place < len(row) else None
        if number is not None:
            found.add(number)
            cells = [cell.strip() for column, cell in enumerate(row) if column != place]
            for column, cell in zip(values, cells, strict=False):
                column[number] = cell
    if not found or not names:
        raise DataError(f"{path} has a label for none of the {len(keys):,} images: expected rows like {keys[0]},label.")
    return [Column(name, tuple(column)) for name, column in zip(names, values, strict=True)], len(found)


def chosen(columns: Iterable[Column], name: str) -> str:
    """The name of the column to colour by first: the one asked for, else `label`, else the first.

    Raises:
        ConfigError: there is none of that name.
    """
    names = [column.name for column in columns]
    if name and name not in names:
        raise ConfigError(f"there is no column {name!r} to colour by: choose one of {', '.join(names) or 'none'}.")
    return name or next((each for each in ("label", *names) if each in names), "")


def unique_names(columns: Iterable[Column]) -> list[Column]:
    """The same columns; one whose name was there before gets a number."""
    found: dict[str, Column] = {}
    for column in columns:
        name, number = column.name, 2
        while name in found:
            name, number = f"{column.name} {number}", number + 1
        found[name] = Column(name, column.values)
    return list(found.values())


def _labels(source: Source, keys: Sequence[str]) -> list[Column]:
    if source.labels is None:
        return []
    labels = dict(zip(source.keys, source.labels, strict=True))
    return [Column("label", tuple(labels.get(key, "") for key in keys))]


def _folders(keys: Sequence[str]) -> list[Column]:
    parts = [key.split("/")[:-1] for key in keys]
    depth = max((len(each) for each in parts), default=0)
    return [
        Column(
            "folder" if level == 0 else f"folder {level + 1}",
            tuple(each[level] if level < len(each) else "" for each in parts),
        )
        for level in range(depth)
    ]


def _features(features: FeatureFolder, rows: Sequence[int]) -> list[Column]:
    columns: Mapping[str, Sequence[object]] = features.columns(rows)
    return [Column(name, tuple(map(_text, values))) for name, values in columns.items()]


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class _Finder:
    """Finds the number of a key by the key, by its end, or by a longer path that ends in it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = {key: number for number, key in enumerate(keys)}
        self.ends: dict[str, int | None] = {}  # None where several keys end so
        for number, key in enumerate(keys):
            for end in _ends(key):
                self.ends[end] = None if end in self.ends else number

    def __call__(self, path: str) -> int | None:
        path = path.strip().replace("\\", "/").removeprefix("./")
        for end in (path, *_ends(path)):
            if end in self.keys:
                return self.keys[end]
        return self.ends.get(path)


def _ends(path: str) -> list[str]:
    """The ends of a path that begin after a slash, the longest first."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))]


def _header(rows: Sequence[Sequence[str]], find: _Finder) -> tuple[int, list[str]]:
    """Which column holds the paths, and the names of the others."""
    first = [cell.strip() for cell in rows[0]] if rows else []
    if first and find(first[0]) is None:
        lower = [cell.lower() for cell in first]
        place = next((lower.index(name) for name in PATH_NAMES if name in lower), 0)
        return place, [name or f"column {number + 1}" for number, name in enumerate(first) if number != place]
    width = max(map(len, rows), default=0)
    return 0, ["label" if number == 1 else f"label {number}" for number in range(1, width)]
