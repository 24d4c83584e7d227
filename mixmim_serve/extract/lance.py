"""A Lance data set, `features.lance`: at least one fragment per shard, and one commit that lists the complete shards.

Lance gives its files random names, so two runs write the same table into files of different names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from mixmim_serve.errors import ConfigError
from mixmim_serve.extract.folder import DATASET, Files, Folder, sha256_and_size
from mixmim_serve.extract.plan import ShardResult
from mixmim_serve.extract.table import Table

os.environ.setdefault("LANCE_LOG", "error")  # it warns about every data set that does not exist yet
try:
    import lance
    from lance.file import LanceFileReader
    from lance.fragment import FragmentMetadata, write_fragments
except ImportError as error:
    raise ConfigError("Lance is not installed: run pip install 'mixmim-serve[lance]'.") from error


@dataclass(frozen=True)
class LanceSink:
    """Writes fragments, which `commit` later adds to the data set; see `mixmim_serve.extract.sinks.Sink`."""

    folder: Folder
    table: Table

    def __post_init__(self) -> None:
        if self.folder.is_url:
            raise ConfigError("Lance data sets are written to local folders only: choose one, or another format.")

    def write(self, shard: str, rows: Iterator[pa.Table]) -> Files:
        """See `Sink.write`."""
        batches = (batch for group in self.table.groups(rows) for batch in group.to_batches())
        reader = pa.RecordBatchReader.from_batches(self.table.schema, batches)
        with self.folder.translated_errors(DATASET):
            fragments = write_fragments(reader, self.folder.path(DATASET))
        return dict(self._entry(fragment) for fragment in fragments)

    def read(self, files: Mapping[str, Any]) -> pa.Table:
        """See `Sink.read`."""
        return pa.concat_tables(read(self.folder, name) for name in files)

    def _entry(self, fragment: Any) -> tuple[str, dict[str, Any]]:
        (name,) = (f"{DATASET}/data/{file.path}" for file in fragment.files)
        sha256, size = sha256_and_size(Path(self.folder.path(name)))
        return name, {"bytes": size, "sha256": sha256, "fragment": fragment.to_json()}


def read(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of one file."""
    return LanceFileReader(folder.path(name), columns=columns).read_all().to_table()


def column_names(folder: Folder, name: str) -> list[str]:
    """The columns of one file."""
    return list(LanceFileReader(folder.path(name)).metadata().schema.names)


def commit(folder: Folder, shards: Mapping[str, ShardResult]) -> None:
    """Write a version of the data set with exactly these shards, in order, and delete all other files."""
    files = {name: entry for _, result in sorted(shards.items()) for name, entry in result.files.items()}
    if not files:
        return
    schema = LanceFileReader(folder.path(next(iter(files)))).metadata().schema
    fragments = [FragmentMetadata.from_json(json.dumps(entry["fragment"])) for entry in files.values()]
    with folder.translated_errors(DATASET):
        dataset = lance.LanceDataset.commit(folder.path(DATASET), lance.LanceOperation.Overwrite(schema, fragments))
        dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
