"""Parquet files with a column of encoded images: plain bytes, or the struct {bytes, path} of Hugging Face datasets.

Row groups are read as a whole, and the last ones stay in memory up to `CACHED_BYTES`, so the speed of random reads
depends on their size. Hugging Face writes 100 images per row group, which works well. pyarrow is imported when a file
is opened.
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
from mixmim_serve.sources.base import LABEL_NAMES, all_or_none, digest_of, run_of

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")  # columns, best first
CACHED_BYTES = 500_000_000  # of row groups per process, for all sources together; the newest one is always cached


@dataclass(frozen=True)
class ParquetSource:
    """One row per image. The key is file and row: `train-0.parquet/00000012`."""

    name: str
    keys: Sequence[str]
    labels: Sequence[str] | None
    runs: Sequence[range]  # one per row group
    groups: Sequence[tuple[str, int]]  # file and row group number of each run
    column: str
    stamps: Mapping[str, tuple[int, str]]  # `storage.stamp` of each file

    @property
    def places(self) -> Iterable[str]:
        """See `Source.places`."""
        return self.stamps.keys()

    def read(self, index: int) -> bytes:
        """See `Source.read`. The whole row group is read, however large its images are."""
        run = run_of(self.runs, index)
        place, number = self.groups[run]
        with storage.translated_errors(place, ImageError):
            cell = _row_groups.get(place, number, self.column)[index - self.runs[run].start]
        if not cell.is_valid:
            raise UndecodableImageError(f"{self.keys[index]} has no bytes: store the image itself, not its path.")
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
    """Open Parquet files, reading their schemas and labels.

    Raises:
        DataError: a file is missing or damaged, has no image column or not the same one as the others, or no rows.
    """
    files = storage.parallel_map(_open, places)
    if len({file.column for file in files}) > 1:
        raise DataError(f"{name} has its images in columns of different names: use files with the same columns.")
    groups = [(place, *group) for place, file in zip(places, files, strict=True) for group in file.groups]
    if not groups:
        raise DataError(f"{name} has no rows: expected one image per row.")
    ends = list(itertools.accumulate(rows for _, _, rows in groups))
    return ParquetSource(
        name,
        keys=tuple(
            f"{short}/{row:08d}"
            for short, file in zip(storage.short_names(places), files, strict=True)
            for row in range(sum(rows for _, rows in file.groups))
        ),
        labels=all_or_none(label for file in files for label in file.labels),
        runs=tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        groups=tuple((place, number) for place, number, _ in groups),
        column=files[0].column,
        stamps={place: file.stamp for place, file in zip(places, files, strict=True)},
    )


@dataclass(frozen=True)
class _File:
    groups: Sequence[tuple[int, int]]  # number and row count of each non-empty row group
    labels: Sequence[str | None]
    column: str
    stamp: tuple[int, str]


def _open(place: str) -> _File:
    import pyarrow.parquet as pq

    stamp = storage.stamp(place)
    with storage.translated_errors(place, DataError), storage.open_seekable(place) as opened:
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
        f"{place} has no column that is clearly the images: expected a column `image` of bytes, or of structs with "
        f"bytes; its columns are {', '.join(schema.names)}."
    )


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _labels(file: Any) -> list[str | None]:
    """The class of each row; numbers become names if Hugging Face's metadata has them (-1 means no label)."""
    from pyarrow import types

    schema = file.schema_arrow
    names = _class_names(schema.metadata or {})
    name = next((name for name in (*LABEL_NAMES, *names) if name in schema.names), None)
    if name is None:
        return [None] * file.metadata.num_rows
    column = file.read(columns=[name]).column(0)
    if types.is_integer(column.type) and name in names:
        classes = dict(enumerate(names[name]))
        return [classes.get(value) for value in column.to_pylist()]
    return [str(value) if isinstance(value, str | int) else None for value in column.to_pylist()]


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The `ClassLabel` columns in the schema metadata of `datasets`, with their class names."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):  # missing, or in another form
        return {}


class _RowGroups:
    """A cache of the row groups that this process read last, as pyarrow columns of encoded images."""

    def __init__(self) -> None:
        self.columns: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self.lock = threading.Lock()  # or every thread of a pool would read the same row group

    def get(self, place: str, number: int, column: str) -> Any:
        key = (place, number, column)
        with self.lock:
            if key not in self.columns:
                while self.columns and sum(column.nbytes for column in self.columns.values()) > CACHED_BYTES:
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
