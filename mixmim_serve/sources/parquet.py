"""Parquet files with encoded images in a column: plain bytes, or the struct {bytes, path} of Hugging Face datasets.

A row group is read whole, and the last ones stay in memory up to `CACHED_BYTES`; so the speed of reading out of order
depends on their size. Hugging Face writes 100 images in one, which suits. pyarrow is imported when a file is opened.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmim_serve.errors import DataError, ImageError, UndecodableImageError
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, complete, digest_of, run_of

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")  # columns, best first
CACHED_BYTES = 500_000_000  # of row groups in a process, all sources together; one more is always let in


@dataclass(frozen=True)
class ParquetSource:
    """Rows of Parquet files. The key is file and row: `train-0.parquet/00000012`."""

    name: str
    keys: Sequence[str]
    labels: Sequence[str] | None
    runs: Sequence[range]  # one a row group
    groups: Sequence[tuple[str, int]]  # place and number of the row group of each run
    column: str
    stamps: Mapping[str, tuple[int, str]]  # of each place, as `storage.stamp` gives it

    @property
    def places(self) -> Iterable[str]:
        """See `Source.places`."""
        return self.stamps.keys()

    def read(self, index: int) -> bytes:
        """The encoded image; see `Source.read`. A row group is read whole, whatever the size of its images."""
        run = run_of(self.runs, index)
        place, number = self.groups[run]
        with storage.explained(place, ImageError):
            cell = _row_groups.get(place, number, self.column)[index - self.runs[run].start]
        if not cell.is_valid:
            raise UndecodableImageError(f"{self.keys[index]} holds no bytes: store the image itself, not its path.")
        content = cell.as_buffer()
        storage.check_size(self.keys[index], content.size)
        return bytes(content)

    def check(self, index: int) -> None:
        """See `Source.check`."""
        place = self.groups[run_of(self.runs, index)][0]
        storage.check_stamp(place, self.stamps[place])

    def digest(self) -> str:
        """See `Source.digest`; sizes are those of the files."""
        return digest_of(self.keys, (b"%d " % size for size, _ in self.stamps.values()))


def open_parquet(name: str, places: Sequence[str]) -> ParquetSource:
    """Read the schemas and labels.

    Raises:
        DataError: a file is missing or damaged, has no column of images or another one than the first, or no rows.
    """
    files = storage.each(_open, places)
    if len({file.column for file in files}) > 1:
        raise DataError(f"{name} has its images in columns of different names: give files of one kind.")
    groups = [(place, *group) for place, file in zip(places, files, strict=True) for group in file.groups]
    if not groups:
        raise DataError(f"{name} has no rows: expected an image in each.")
    ends = list(itertools.accumulate(rows for _, _, rows in groups))
    return ParquetSource(
        name,
        keys=tuple(
            f"{short}/{row:08d}"
            for short, file in zip(storage.short_names(places), files, strict=True)
            for row in range(sum(rows for _, rows in file.groups))
        ),
        labels=complete(label for file in files for label in file.labels),
        runs=tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        groups=tuple((place, number) for place, number, _ in groups),
        column=files[0].column,
        stamps={place: file.stamp for place, file in zip(places, files, strict=True)},
    )


@dataclass(frozen=True)
class _File:
    groups: Sequence[tuple[int, int]]  # number and rows of each row group that has any
    labels: Sequence[str | None]
    column: str
    stamp: tuple[int, str]


def _open(place: str) -> _File:
    import pyarrow.parquet as pq

    stamp = storage.stamp(place)
    with storage.explained(place, DataError), storage.open_seekable(place) as opened:
        file = pq.ParquetFile(opened)
        rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        groups = [(number, count) for number, count in enumerate(rows) if count]
        return _File(groups, _labels(file), _image_column(place, file.schema_arrow), stamp)


def _image_column(place: str, schema: Any) -> str:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in IMAGE_NAMES if name in candidates]
    if named or len(candidates) == 1:
        return str((named or candidates)[0])
    raise DataError(
        f"{place} has no column that is clearly the images: expected bytes, or a struct with bytes in it, "
        f"in a column named image; its columns are {', '.join(schema.names)}."
    )


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _labels(file: Any) -> list[str | None]:
    """The class of each row; numbers become names where Hugging Face's metadata have them (-1 is none)."""
    from pyarrow import types

    schema = file.schema_arrow
    names = _class_names(schema.metadata or {})
    known = [name for name in (*LABEL_NAMES, *names) if name in schema.names]
    if not known:
        return [None] * file.metadata.num_rows
    column = file.read(columns=known[:1]).column(0)
    if types.is_integer(column.type) and known[0] in names:
        own = dict(enumerate(names[known[0]]))
        return [own.get(value) for value in column.to_pylist()]
    return [str(value) if isinstance(value, str | int) else None for value in column.to_pylist()]


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The `ClassLabel` columns that `datasets` notes in a schema, with the names of their classes."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):  # none, or in a form of its own
        return {}


class _RowGroups:
    """The encoded images of the row groups that this process read last, as pyarrow columns."""

    def __init__(self) -> None:
        self.columns: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self.lock = threading.Lock()  # or every thread of a pool would decode the row group that all of them wait for

    def get(self, place: str, number: int, column: str) -> Any:
        key = (place, number, column)
        with self.lock:
            if key not in self.columns:
                while self.columns and sum(kept.nbytes for kept in self.columns.values()) > CACHED_BYTES:
                    self.columns.popitem(last=False)
                self.columns[key] = _read_group(*key)
            self.columns.move_to_end(key)
            return self.columns[key]


_row_groups = _RowGroups()


def _read_group(place: str, number: int, column: str) -> Any:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with storage.open_seekable(place) as opened:
        file = pq.ParquetFile(opened)
        if file.schema_arrow.field(column).type.num_fields == 0:
            return file.read_row_group(number, columns=[column]).column(0)
        return pc.struct_field(file.read_row_group(number, columns=[f"{column}.bytes"]).column(0), "bytes")
