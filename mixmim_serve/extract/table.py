"""The columns of a feature table: their names and types, and rows from arrays.

key             the source's name of the image
embedding       fixed-size list of float32 or float16
class, probability    the most probable class, with `ExtractOptions.classes`
stage1..., logits     on request: flat fixed-size lists; `shapes` in the file's metadata has their shapes
                      (classes and logits are those of `ExtractOptions.head`)
width, height   of the upright image
sha256          of the encoded image, in hex
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.bundle import Bundle
from mixmim_serve.engines import Engine, identity
from mixmim_serve.engines.base import Arrays
from mixmim_serve.errors import DataError
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.heads import Head, read_heads
from mixmim_serve.tasks import top_classes

try:
    import pyarrow as pa
except ImportError as error:
    raise DataError("pyarrow is not installed: run pip install 'mixmim-serve[extract]'.") from error

METADATA_KEY = "mixmim"  # in the metadata of a Parquet file
ROW_GROUP, ROW_GROUP_BYTES = 1024, 64_000_000  # rows in memory and per row group; fewer if rows are large


@dataclass(frozen=True)
class Row:
    """The columns of an image besides its features."""

    key: str
    width: int
    height: int
    sha256: str


class Table:
    """The schema for one engine and its options; turns arrays into rows."""

    def __init__(self, engine: Engine, options: ExtractOptions) -> None:
        options.check(engine.bundle)
        self.options = options
        self.has_classes = bool(options.decided(engine.bundle).classes)
        self.head = chosen_head(engine.bundle, options)
        shapes = _shapes(engine.bundle, options, self.head)
        self.engine: dict[str, Any] = engine_metadata(engine, options)
        self.lists = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        metadata = {METADATA_KEY: json.dumps({**self.engine, "shapes": shapes}, sort_keys=True)}
        self.schema = pa.schema(_fields(self.lists, options.dtype, self.has_classes), metadata)
        width = sum(self.lists.values()) * np.dtype(options.dtype).itemsize
        self.group = max(1, min(ROW_GROUP, ROW_GROUP_BYTES // width))  # rows

    @property
    def outputs(self) -> tuple[str, ...]:
        """The encoder outputs that the columns need."""
        read = (name for name in self.lists if name != "logits")
        return tuple(dict.fromkeys((*read, *(self.head.inputs if self.head else ()))))

    def rows(self, rows: Sequence[Row], arrays: Arrays) -> pa.Table:
        """A table of images and their outputs, (rows, ...) each."""
        columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}
        if self.head:
            arrays = {**arrays, "logits": _logits(self.head, arrays)}
        for name, size in self.lists.items():
            flat = arrays[name].astype(self.options.dtype).reshape(-1)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), size)
        if self.head and self.has_classes:
            best = [top_classes(self.head, logits, 1)[0] for logits in arrays["logits"]]
            columns |= {"class": [top.label for top in best], "probability": [top.probability for top in best]}
        arrays_in_order = [pa.array(columns[field.name], field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays_in_order, schema=self.schema)

    def groups(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The same rows in tables of `group` rows, so that files do not depend on the size of batches."""
        rest = self.schema.empty_table()
        for table in tables:
            rest = pa.concat_tables([rest, table])
            while len(rest) >= self.group:
                yield rest.slice(0, self.group).combine_chunks()
                rest = rest.slice(self.group).combine_chunks()  # a copy: a slice would keep all rows in memory
        if len(rest):
            yield rest.combine_chunks()


def engine_metadata(engine: Engine, options: ExtractOptions | None = None) -> dict[str, Any]:
    """Name, fingerprints, engine, precision and preprocessing behind the features, as JSON values.

    With options whose classes or logits are from a named head, also name and fingerprint of that.
    """
    head = chosen_head(engine.bundle, options) if options else None
    named = {} if head is None or head.is_main else {"head": {"name": head.name, "fingerprint": head.fingerprint}}
    return {
        **identity(engine),
        "engine": engine.name,
        "precision": engine.precision,
        "preprocessing": engine.bundle.description.to_dict()["preprocessing"],
        **named,
    }


def chosen_head(bundle: Bundle, options: ExtractOptions) -> Head | None:
    """The head that classes and logits are from; None where neither is stored."""
    name = options.decided(bundle).head
    return read_heads(bundle).choose(name) if name else None


def _logits(head: Head, arrays: Arrays) -> NDArray[np.float32]:
    """The head's logits, (rows, classes): of each image alone, so that they do not depend on its batch."""
    rows = len(next(iter(arrays.values())))
    return np.stack([head.logits({name: arrays[name][row] for name in head.inputs}) for row in range(rows)])


def matrix(column: Any) -> NDArray[Any]:
    """A column of fixed-size lists as an array (rows, size), not copied if it has one chunk."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    size = column.type.list_size
    arrays = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for chunk in chunks]
    if len(arrays) == 1:
        return arrays[0]  # type: ignore[no-any-return]
    return np.concatenate(arrays) if arrays else np.zeros((0, size), column.type.value_type.to_pandas_dtype())


def _fields(lists: dict[str, int], dtype: str, has_classes: bool) -> list[Any]:
    kind = pa.float16() if dtype == "float16" else pa.float32()
    features = [pa.field(name, pa.list_(kind, size)) for name, size in lists.items()]
    classes = [pa.field("class", pa.string()), pa.field("probability", pa.float32())] if has_classes else []
    image = [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("sha256", pa.string())]
    return [pa.field("key", pa.string()), features[0], *classes, *features[1:], *image]


def _shapes(bundle: Bundle, options: ExtractOptions, head: Head | None) -> dict[str, list[int]]:
    """Shapes of the embedding and each feature of one image."""
    arch = bundle.arch
    shapes = {"embedding": [arch.embedding_size]}
    for name in options.features:
        if name == "logits":
            shapes[name] = [len(head.classes) if head else 0]
        else:
            stage = int(name.removeprefix("stage")) - 1
            shapes[name] = [arch.dims[stage], arch.grids[stage], arch.grids[stage]]
    return shapes
