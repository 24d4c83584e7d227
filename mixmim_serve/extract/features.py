"""Features read back: the output of `mixmim extract`, one shard at a time, in the order of the source."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.engines import engine_fingerprint, open_engine
from mixmim_serve.errors import OutputError
from mixmim_serve.extract.folder import DATASET, Folder
from mixmim_serve.extract.manifest import SHOWN, made_by, read_manifest
from mixmim_serve.extract.sinks import read_npy, read_parquet
from mixmim_serve.extract.table import engine_metadata, matrix
from mixmim_serve.preprocess import preprocess
from mixmim_serve.shipped import earlier_advice

Vectors = NDArray[np.float32]
VALUES = ("class", "probability", "width", "height")  # columns of single values for people; see table.py


@dataclass(frozen=True)
class VectorBlock:
    """Consecutive rows of a folder: `start` to `start + len(vectors)`."""

    start: int
    vectors: Vectors  # (rows, D), each of length 1


class FeatureFolder:
    """The features in a folder, of its complete shards."""

    def __init__(self, place: str | Path) -> None:
        """Read the manifest.

        Raises:
            OutputError: there is no manifest, or no row yet.
        """
        self.folder = Folder(place)
        self.manifest = read_manifest(self.folder)
        self.shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        if not self.shards:
            raise OutputError(f"{place} has no features yet: let mixmim extract finish.")
        self.ends = list(itertools.accumulate(shard["rows"] for shard in self.shards))

    @property
    def model(self) -> str:
        """What made the features, for a heading; manifests of older versions have no model fingerprint."""
        known = self.manifest.get("model_fingerprint", "")
        return f"{self.manifest['model']}, model fingerprint {known[:SHOWN]}" if known else str(self.manifest["model"])

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.ends[-1])

    def blocks(self) -> Iterator[VectorBlock]:
        """All vectors, one shard at a time; local files are memory-mapped, so each pass is cheap."""
        for number in range(len(self.shards)):
            yield self.block(number)

    def block(self, number: int) -> VectorBlock:
        """The vectors of one shard.

        Raises:
            OutputError: its file does not match the manifest.
        """
        vectors = self._vectors(self.shards[number]).astype(np.float32)
        if len(vectors) != self.shards[number]["rows"]:
            raise OutputError(f"{self.folder.place} was altered: run the same `mixmim extract` again.")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(lengths, np.finfo(np.float32).tiny)
        return VectorBlock(self.ends[number] - len(vectors), vectors)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of these rows; only their shards are opened."""
        keys: dict[int, str] = {}
        for number, group in itertools.groupby(sorted(rows), lambda row: bisect.bisect(self.ends, row)):
            column = self._keys(self.shards[number])
            start = self.ends[number] - self.shards[number]["rows"]
            keys |= {row: column[row - start].as_py() for row in group}
        return [keys[row] for row in rows]

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """What these rows hold of single values besides key and sha256: class, width, ...; None where it is missing."""
        found: dict[str, dict[int, Any]] = {}
        for number, group in itertools.groupby(sorted(rows), lambda row: bisect.bisect(self.ends, row)):
            start = self.ends[number] - self.shards[number]["rows"]
            places = list(group)
            for name, column in self._values(self.shards[number]).items():
                found.setdefault(name, {}).update((row, column[row - start].as_py()) for row in places)
        return {name: [values.get(row) for row in rows] for name, values in found.items()}

    def vectors(self, rows: Sequence[int]) -> Vectors:
        """The vectors of these rows, (rows, D), each of length 1."""
        vectors: dict[int, Vectors] = {}
        for number, group in itertools.groupby(sorted(rows), lambda row: bisect.bisect(self.ends, row)):
            block = self.block(number)
            vectors |= {row: block.vectors[row - block.start] for row in group}
        return np.stack([vectors[row] for row in rows])

    def _vectors(self, shard: dict[str, Any]) -> NDArray[Any]:
        files = sorted(shard["files"])
        if self.manifest["options"]["format"] == "npy":
            return read_npy(self.folder.path(f"features/{shard['name']}.npy"))
        if files[0].startswith(DATASET):
            return matrix(self._lance(files, "embedding"))
        return matrix(read_parquet(self.folder.path(files[0]), ["embedding"])["embedding"])

    def _keys(self, shard: dict[str, Any]) -> Any:
        files = sorted(shard["files"])
        if files[0].startswith(DATASET):
            return self._lance(files, "key")
        return read_parquet(self.folder.path(_parquet(files)), ["key"])["key"]

    def _values(self, shard: dict[str, Any]) -> dict[str, Any]:
        files = sorted(shard["files"])
        if files[0].startswith(DATASET):
            from mixmim_serve.extract.lance import column_names

            return {name: self._lance(files, name) for name in column_names(self.folder, files[0]) if name in VALUES}
        table = read_parquet(self.folder.path(_parquet(files)), list(VALUES))
        return {name: table[name] for name in table.column_names}

    def _lance(self, files: Sequence[str], column: str) -> Any:
        import pyarrow as pa

        from mixmim_serve.extract.lance import read

        return pa.concat_tables(read(self.folder, name, [column]) for name in files)[column]


def _parquet(files: Sequence[str]) -> str:
    """The one Parquet file of a shard."""
    (name,) = (name for name in files if name.endswith(".parquet"))
    return name


def embed_query(manifest: Mapping[str, Any], data: bytes, bundle: Path | None = None) -> Vectors:
    """Embed an encoded image, (D,), with the bundle, engine and precision that a manifest names, or a moved `bundle`.

    Raises:
        ImageError: the image cannot be read.
        BundleError: the bundle is no longer there.
        OutputError: the bundle or engine is not the one that made the features.
    """
    engine = open_engine(
        bundle or Path(manifest["bundle"]), manifest["engine"].partition("-")[0], manifest["precision"]
    )
    if engine_fingerprint(engine) != manifest["fingerprint"]:
        advice = earlier_advice(manifest)
        raise OutputError(
            f"{made_by(engine_metadata(engine))} did not make these features, but {made_by(manifest)}: "
            f"{f'{advice} with --bundle' if advice else 'name their bundle with --bundle'}."
        )
    pixels = preprocess(data, engine.bundle.description.preprocessing)
    vector: Vectors = engine.run("encoder", {"pixels": pixels[None]}, ["embedding"])["embedding"][0]
    return vector
