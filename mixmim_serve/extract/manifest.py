"""Which shards are complete, and what they were made from.

Each shard has a record in `shards/`, written last: a shard without one is done again. `manifest.json` combines the
records. Only the process that leads a run writes it, so any number of workers may write shards. `errors.parquet` lists
the images that could not be read.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixmim_serve.errors import OutputError
from mixmim_serve.extract.folder import DATASET, ERRORS, FEATURES, LEDGER, MANIFEST, Folder
from mixmim_serve.extract.plan import ShardResult
from mixmim_serve.shipped import earlier_advice
from mixmim_serve.strict_json import parse_json

FORMAT = 1  # of the manifest; increased when an older reader would misread the folder
SAVE_EVERY = 30.0  # seconds between two updates of the manifest
AT_ONCE = 16  # records read in parallel
SHOWN = 8  # characters of a fingerprint in a message
_ERRORS_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("shard", pa.string())])


@dataclass(frozen=True)
class Origin:
    """What a folder of features is made from; a run that resumes it must have the same."""

    bundle: str  # as the user named it, for later commands; not compared
    source: str  # likewise
    engine: Mapping[str, Any]  # see `table.engine_metadata`
    options: Mapping[str, Any]
    images: int
    digest: str  # of the source
    has_head: bool = False  # inside the network

    def check_same(self, place: str, manifest: Mapping[str, Any]) -> None:
        """Compare with the manifest of a folder.

        Raises:
            OutputError: naming what differs, and what to do.
        """
        if manifest.get("format") != FORMAT:
            raise OutputError(
                f"{place} has format {manifest.get('format')}, this version writes {FORMAT}: choose another folder."
            )
        if manifest["fingerprint"] != self.engine["fingerprint"]:
            advice = earlier_advice(manifest)
            raise OutputError(
                f"{place} has features of {made_by(manifest)}, not of {made_by(self.engine)}: "
                f"{advice or 'choose another folder, or that bundle and engine'}."
            )
        recorded = {"classes": self.has_head} | manifest["options"]  # older versions always wrote the classes
        different = [name for name, value in recorded.items() if self.options.get(name) != value]
        if "classes" in different and "head" in different:
            different.remove("head")  # it follows from the other
        if different:
            values = ", ".join(f"{name} {recorded[name]}" for name in different)
            raise OutputError(
                f"{place} was started with other options ({values}): use those, or choose another folder."
            )
        if (was := manifest.get("head")) != (now := self.engine.get("head")):
            name = (now or was or {}).get("name")
            raise OutputError(
                f"the head {name} of this bundle is not the one with which {place} was started: choose another folder."
            )
        if manifest["source"]["sha256"] != self.digest:
            raise OutputError(
                f"{self.source} has changed since {place} was started (then {manifest['source']['images']:,} images, "
                f"now {self.images:,}; names or sizes differ): restore the images, or choose another folder."
            )


class Ledger:
    """The complete shards of a folder."""

    def __init__(self, folder: Folder, origin: Origin) -> None:
        """Read the folder, or begin a new one.

        Raises:
            OutputError: the folder has other contents, or cannot be written to.
        """
        self.folder, self.origin = folder, origin
        self.complete: dict[str, ShardResult] = {}
        self.saved = 0.0
        manifest = folder.read_bytes(MANIFEST)
        if manifest is not None:
            origin.check_same(folder.place, read_manifest(folder, manifest))
            self.scan()
        elif folder.sizes(FEATURES):
            raise OutputError(f"{folder.place} has features but no {MANIFEST}: choose another folder.")
        self.save(complete=False)

    def add(self, result: ShardResult) -> None:
        """Add a shard that a worker has recorded."""
        self.complete[result.shard] = result
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save(complete=False)

    @property
    def rows(self) -> int:
        """Rows of all complete shards."""
        return sum(result.rows for result in self.complete.values())

    @property
    def errors(self) -> int:
        """Images of complete shards that could not be read."""
        return sum(len(result.errors) for result in self.complete.values())

    def save(self, *, complete: bool) -> None:
        """Write the manifest."""
        shards = [
            {"name": name, "images": done.images, "rows": done.rows, "errors": len(done.errors), "files": done.files}
            for name, done in sorted(self.complete.items())
        ]
        values = {
            "format": FORMAT,
            "complete": complete,
            **self.origin.engine,
            "bundle": self.origin.bundle,
            "source": {"name": self.origin.source, "images": self.origin.images, "sha256": self.origin.digest},
            "options": self.origin.options,
            "rows": self.rows,
            "errors": self.errors,
            "shards": shards,
        }
        self.folder.write_bytes(MANIFEST, (json.dumps(values, indent=1) + "\n").encode())
        self.saved = time.monotonic()

    def save_errors(self) -> None:
        """Write `errors.parquet`, even without errors."""
        rows = [(key, reason, name) for name, done in sorted(self.complete.items()) for key, reason in done.errors]
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        table = pa.table([pa.array(column, pa.string()) for column in columns], schema=_ERRORS_SCHEMA)
        with self.folder.write(ERRORS) as path:
            pq.write_table(table, path)

    def scan(self) -> None:
        """Find the shards that are recorded and still have all their files, with unchanged sizes."""
        self.complete.clear()
        sizes: dict[str, int] = {}
        for below in (FEATURES, f"{DATASET}/data"):
            sizes |= self.folder.sizes(below)
        names = sorted(name for name in self.folder.sizes(LEDGER) if name.endswith(".json"))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for result in pool.map(self._read_record, names):
                if all(sizes.get(file) == entry["bytes"] for file, entry in result.files.items()):
                    self.complete[result.shard] = result

    def _read_record(self, name: str) -> ShardResult:
        values = parse_json(self.folder.read_bytes(name) or b"{}")
        return ShardResult(**values | {"errors": tuple((key, reason) for key, reason in values["errors"])})


def record(folder: Folder, result: ShardResult) -> None:
    """Write a shard's record, after its features."""
    values = dataclasses.asdict(result)
    del values["busy"]
    folder.write_bytes(f"{LEDGER}/{result.shard}.json", (json.dumps(values, indent=1) + "\n").encode())


def read_manifest(folder: Folder, content: bytes | None = None) -> dict[str, Any]:
    """The manifest of a folder of features, parsed; `content` if it is read already.

    Raises:
        OutputError: it is missing or not a manifest.
    """
    content = content if content is not None else folder.read_bytes(MANIFEST)
    if content is None:
        raise OutputError(f"{folder.place} has no {MANIFEST}: expected a folder written by `mixmim extract`.")
    try:
        values: dict[str, Any] = parse_json(content)
        values["format"], values["fingerprint"], values["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder.path(MANIFEST)} is damaged or not a manifest: choose another folder.") from error
    return values


def made_by(engine: Mapping[str, Any]) -> str:
    """What made features, from their manifest or `table.engine_metadata`: model and engine with their fingerprints.

    Manifests of older versions have no model fingerprint.
    """
    model, engine_print = engine.get("model_fingerprint"), engine["fingerprint"]
    known = f" (model fingerprint {model[:SHOWN]})" if model else ""
    name, runtime, precision = (engine[key] for key in ("model", "engine", "precision"))
    return f"{name}{known} on {runtime} in {precision} (engine fingerprint {engine_print[:SHOWN]})"
