"""Features as one Parquet file: `path` and `embedding`, with the model's fingerprint in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mixmim_serve.engines import Engine, engine_fingerprint
from mixmim_serve.errors import DataError
from mixmim_serve.extract.run import Result
from mixmim_serve.files import atomic_path

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise DataError("pyarrow is not installed: run pip install 'mixmim-serve[extract]'.") from error

ROWS = 4096  # in memory and in a row group


def write_parquet(results: Iterable[Result], engine: Engine, source: Path, target: Path) -> int:
    """Write every result that has an embedding; the file appears whole or not at all. Returns the number of rows."""
    bundle = engine.bundle
    about = {
        "fingerprint": engine_fingerprint(engine),
        "architecture": bundle.description.to_dict()["architecture"],
        "preprocessing": bundle.description.to_dict()["preprocessing"],
    }
    schema = pa.schema(
        [("path", pa.string()), ("embedding", pa.list_(pa.float32(), bundle.arch.embedding_size))],
        metadata={"mixmim": json.dumps(about)},
    )
    rows = 0
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        pending: list[Result] = []
        for result in results:
            if result.error is None:
                pending.append(result)
            if len(pending) >= ROWS:
                rows += _write(writer, schema, pending, source)
                pending = []
        rows += _write(writer, schema, pending, source)
    return rows


def _write(writer: pq.ParquetWriter, schema: pa.Schema, results: list[Result], source: Path) -> int:
    if results:
        paths = [result.path.relative_to(source).as_posix() for result in results]
        values = pa.array(np.concatenate([result.outputs["embedding"] for result in results]))
        vectors = pa.FixedSizeListArray.from_arrays(values, schema.field("embedding").type.list_size)
        writer.write_table(pa.Table.from_arrays([pa.array(paths), vectors], schema=schema))
    return len(results)
