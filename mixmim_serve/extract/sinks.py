"""Write the rows of a shard to files. Equal rows give equal bytes: fixed settings, no dates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixmim_serve.extract.folder import FEATURES, Files, Folder, sha256_and_size
from mixmim_serve.extract.table import Table, matrix
from mixmim_serve.sources import storage


class Sink(Protocol):
    """Writes and reads one format."""

    def write(self, shard: str, rows: Iterator[pa.Table]) -> Files:
        """Write a shard; its files appear complete or not at all."""

    def read(self, files: Mapping[str, Any]) -> pa.Table:
        """Read a shard's rows back, with all columns."""


def open_sink(folder: Folder, table: Table) -> Sink:
    """The sink for the format that the options name."""
    if table.options.format == "npy":
        return NpySink(folder, table)
    if table.options.format == "lance":
        from mixmim_serve.extract.lance import LanceSink

        lance: Sink = LanceSink(folder, table)
        return lance
    return ParquetSink(folder, table)


@dataclass(frozen=True)
class ParquetSink:
    """`features/000000.parquet`, with every column."""

    folder: Folder
    table: Table

    def write(self, shard: str, rows: Iterator[pa.Table]) -> Files:
        """See `Sink.write`."""
        name = f"{FEATURES}/{shard}.parquet"
        with self.folder.write(name) as path:
            _write_parquet(path, self.table.schema, self.table.groups(rows))
            return _entry(name, path)

    def read(self, files: Mapping[str, Any]) -> pa.Table:
        """See `Sink.read`."""
        (name,) = files
        return read_parquet(self.folder.path(name))


@dataclass(frozen=True)
class NpySink:
    """`features/000000.npy` (rows, D), `features/000000.stage4.npy`..., and `features/000000.keys.parquet`."""

    folder: Folder
    table: Table

    def write(self, shard: str, rows: Iterator[pa.Table]) -> Files:
        """See `Sink.write`."""
        files: Files = {}
        with contextlib.ExitStack() as stack:
            arrays: dict[str, tuple[Path, _NpyWriter]] = {}
            for column, size in self.table.lists.items():
                path = stack.enter_context(self.folder.write(_npy_name(shard, column)))
                file = stack.enter_context(path.open("wb"))
                arrays[column] = path, _NpyWriter(file, size, np.dtype(self.table.options.dtype))
            keys = stack.enter_context(self.folder.write(f"{FEATURES}/{shard}.keys.parquet"))
            _write_parquet(keys, self._keys_schema(), self._append(arrays, rows))
            for column, (path, writer) in arrays.items():
                writer.close()
                files |= _entry(_npy_name(shard, column), path)
            return files | _entry(f"{FEATURES}/{shard}.keys.parquet", keys)

    def read(self, files: Mapping[str, Any]) -> pa.Table:
        """See `Sink.read`."""
        (keys,) = (name for name in files if name.endswith(".keys.parquet"))
        table = read_parquet(self.folder.path(keys))
        columns: dict[str, Any] = {name: table[name] for name in table.column_names}
        for column, size in self.table.lists.items():
            array = read_npy(self.folder.path(_npy_name(keys.split("/")[-1].partition(".")[0], column)))
            columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), size)
        return pa.table([columns[name] for name in self.table.schema.names], schema=self.table.schema)

    def _keys_schema(self) -> pa.Schema:
        return pa.schema([f for f in self.table.schema if f.name not in self.table.lists], self.table.schema.metadata)

    def _append(self, arrays: dict[str, tuple[Path, _NpyWriter]], rows: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Append the arrays to their files, and pass on the other columns."""
        for group in self.table.groups(rows):
            for column, (_, writer) in arrays.items():
                writer.append(matrix(group[column]))
            yield group.drop_columns(list(arrays))


class _NpyWriter:
    """Writes an .npy file whose number of rows is known last; numpy's header has room for it."""

    def __init__(self, file: IO[bytes], size: int, dtype: np.dtype[Any]) -> None:
        self.file, self.size, self.dtype, self.rows = file, size, dtype, 0
        self._write_header()

    def append(self, array: np.ndarray[Any, Any]) -> None:
        """Append rows (n, size)."""
        self.file.write(np.ascontiguousarray(array, self.dtype).data)
        self.rows += len(array)

    def close(self) -> None:
        """Rewrite the header; the caller closes the file."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, self.size)}
        np.lib.format.write_array_header_1_0(self.file, header)


def read_parquet(place: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file, local (memory-mapped) or at a URL."""
    if not storage.is_url(place):
        return pq.ParquetFile(place, memory_map=True).read(columns=columns)
    with storage.open_seekable(place) as file:
        return pq.ParquetFile(file).read(columns=columns)


def read_npy(place: str) -> np.ndarray[Any, Any]:
    """Read an array, local (memory-mapped) or at a URL."""
    if not storage.is_url(place):
        return np.load(place, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    with storage.open_binary(place) as file:
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]


def _write_parquet(path: Path, schema: pa.Schema, groups: Iterator[pa.Table]) -> None:
    """One row group per table. Floats hardly compress; keys and checksums do."""
    compression = {f.name: "NONE" if pa.types.is_fixed_size_list(f.type) else "ZSTD" for f in schema}
    compression |= {f"{name}.list.element": codec for name, codec in compression.items() if codec == "NONE"}
    with pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=False, write_statistics=["key"]
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=len(group))


def _npy_name(shard: str, column: str) -> str:
    return f"{FEATURES}/{shard}.npy" if column == "embedding" else f"{FEATURES}/{shard}.{column}.npy"


def _entry(name: str, path: Path) -> Files:
    sha256, size = sha256_and_size(path)
    return {name: {"bytes": size, "sha256": sha256}}
