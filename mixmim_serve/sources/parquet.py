"""Parquet files with a column of encoded images: plain bytes, or the struct {bytes, path} of Hugging Face datasets.

Row groups are read as a whole, and the last ones stay in memory up to `CACHED_BYTES`, so the speed of random reads
depends on their size. Hugging Face writes 100 images per row group, which works well. pyarrow is imported when a file
is opened.

A file's own statements are not trusted: rows and bytes have limits, and are read in small batches.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from mixmim_serve.errors import DataError, ImageError, UndecodableImageError
from mixmim_serve.preprocess import MAX_IMAGE_BYTES
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, all_or_none, digest_of, run_of
from mixmim_serve.strict_json import parse_json

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")  # columns, best first
CACHED_BYTES = 500_000_000  # of row groups per process, for all sources together; the newest one is always cached
MAX_GROUP_BYTES = 2_000_000_000  # of the images of one row group
MAX_ROWS = 20_000_000  # of a file
MIN_ROW_BYTES = 8  # of a file for each of its rows; the smallest images have some 30
MAX_LABEL = 1000  # characters; a longer text is no label
BATCH, LABEL_BATCH = 16, 1024  # rows that are decoded at once
COLUMNS_SHOWN = 20  # in a message


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
    passed_over: Mapping[str, int] = field(default_factory=dict)  # none: each row is an image

    @property
    def places(self) -> Iterable[str]:
        """See `Source.places`."""
        return self.stamps.keys()

    def read(self, index: int) -> bytes:
        """See `Source.read`. The whole row group is read, however large its images are."""
        run = run_of(self.runs, index)
        place, number = self.groups[run]
        with storage.translated_errors(place, ImageError):
            images, row = _row_groups.get(place, number, self.column), index - self.runs[run].start
        if row >= len(images):
            raise UndecodableImageError(f"{self.keys[index]} is missing: its row group ends before it.")
        image = images[row]
        if image is None:
            raise UndecodableImageError(f"{self.keys[index]} has no bytes: store the image itself, not its path.")
        if isinstance(image, int):
            raise storage.too_large(self.keys[index])
        return image

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
            for short, file in zip(storage.key_names(places), files, strict=True)
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
        _check_rows(place, rows, stamp[0])
        groups = [(number, count) for number, count in enumerate(rows) if count]
        column = _image_column(place, file.schema_arrow)
        return _File(groups, _labels(opened, file, sum(rows)), column, stamp)


def _check_rows(place: str, rows: Sequence[int], size: int) -> None:
    """Refuse a number of rows that the file cannot hold: each takes memory before its image is read."""
    most = min(MAX_ROWS, size // MIN_ROW_BYTES) if size else MAX_ROWS  # 0: the storage does not say
    if min(rows, default=0) < 0 or sum(rows) > most:
        raise DataError(
            f"{place} says that it has {sum(rows):,} rows, more than {most:,}: it is damaged, or has to be split."
        )


def _image_column(place: str, schema: Any) -> str:
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in IMAGE_NAMES if name in candidates]
    if named or len(candidates) == 1:
        return str((named or candidates)[0])
    raise DataError(
        f"{place} has no column that is clearly the images: expected a column `image` of bytes, or of "
        f"structs with bytes; its columns are {', '.join(schema.names[:COLUMNS_SHOWN])[:1000]}."
    )


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _labels(opened: IO[bytes], file: Any, rows: int) -> list[str | None]:
    """The class of each row; numbers become names if Hugging Face's metadata has them (-1 means no label)."""
    from pyarrow import types

    schema = file.schema_arrow
    names = _class_names(schema.metadata or {})
    columns = [name for name in (*LABEL_NAMES, *names) if name in schema.names]
    if not columns:
        return [None] * rows
    kind = schema.field(columns[0]).type
    if types.is_integer(kind) and columns[0] in names:
        own = dict(enumerate(names[columns[0]]))
        labels = [own.get(value) for value in _values(file, columns[0])]
    elif types.is_integer(kind) or types.is_boolean(kind):
        labels = [None if value is None else str(value) for value in _values(file, columns[0])]
    elif types.is_dictionary(kind) or str(kind) in ("string", "large_string", "string_view"):
        labels = list(_texts(opened, columns[0]))
    else:
        return [None] * rows
    return labels if len(labels) == rows else [None] * rows


def _values(file: Any, column: str) -> Iterator[Any]:
    for batch in file.iter_batches(LABEL_BATCH, columns=[column], use_threads=False):
        yield from batch.column(0).to_pylist()


def _texts(opened: IO[bytes], column: str) -> Iterator[str | None]:
    """Texts as the file stores them, each different one once: a long one in every row would not fit into memory."""
    import pyarrow.parquet as pq

    opened.seek(0)
    file = pq.ParquetFile(opened, read_dictionary=[column])
    for batch in file.iter_batches(LABEL_BATCH, columns=[column], use_threads=False):
        coded = batch.column(0)
        if not hasattr(coded, "dictionary"):
            coded = coded.dictionary_encode()
        texts = [_short(text) for text in coded.dictionary]
        yield from (None if index is None else texts[index] for index in coded.indices.to_pylist())


def _short(text: Any) -> str | None:
    """A scalar as text; None for one that is no text, or too long to be a label."""
    if not hasattr(text, "as_buffer") or not text.is_valid:
        value = text.as_py()
        return str(value) if isinstance(value, int) else None
    return str(text.as_py()) if text.as_buffer().size <= MAX_LABEL else None


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The `ClassLabel` columns in the schema metadata of `datasets`, with their class names."""
    try:
        features = parse_json(metadata[b"huggingface"])["info"]["features"]
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):  # missing, or in another form
        return {}


Images = list[bytes | int | None]  # of a row group: bytes, the size of one that is too large, or nothing


class _RowGroups:
    """A cache of the row groups that this process read last, as encoded images."""

    def __init__(self) -> None:
        self.columns: OrderedDict[tuple[str, int, str], tuple[Images | ImageError, int]] = OrderedDict()
        self.lock = threading.Lock()  # or every thread of a pool would read the same row group

    def get(self, place: str, number: int, column: str) -> Images:
        key = (place, number, column)
        with self.lock:
            if key not in self.columns:
                while self.columns and sum(size for _, size in self.columns.values()) > CACHED_BYTES:
                    self.columns.popitem(last=False)
                self.columns[key] = _read_group(*key)
            self.columns.move_to_end(key)
            images, _ = self.columns[key]
        if isinstance(images, ImageError):
            raise images
        return images


_row_groups = _RowGroups()


def _read_group(place: str, number: int, column: str) -> tuple[Images | ImageError, int]:
    """The images of a row group, read a few at a time, and their bytes; an error if they are more than fit."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    refusal = ImageError(
        f"row group {number} of {place} has images of more than {MAX_GROUP_BYTES:,} bytes: write smaller row groups."
    )
    images: Images = []
    total = 0
    with storage.open_seekable(place) as opened:
        file = pq.ParquetFile(opened)
        is_struct = file.schema_arrow.field(column).type.num_fields > 0
        name = f"{column}.bytes" if is_struct else column
        if _declared_bytes(file.metadata, number, name) > MAX_GROUP_BYTES:
            return refusal, 0
        for batch in file.iter_batches(BATCH, row_groups=[number], columns=[name], use_threads=False):
            cells = pc.struct_field(batch.column(0), "bytes") if is_struct else batch.column(0)
            some = [_image(cell) for cell in cells]
            images += some
            total += sum(len(image) for image in some if isinstance(image, bytes))
            if total > MAX_GROUP_BYTES:
                return refusal, 0
    return images, total


def _declared_bytes(metadata: Any, number: int, name: str) -> int:
    """Bytes of a column in a row group, before they are compressed."""
    group = metadata.row_group(number)
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(int(each.total_uncompressed_size) for each in columns if each.path_in_schema == name)


def _image(cell: Any) -> bytes | int | None:
    if not cell.is_valid:
        return None
    content = cell.as_buffer()
    return bytes(content) if content.size <= MAX_IMAGE_BYTES else int(content.size)
