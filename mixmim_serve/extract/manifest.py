"""What is whole, and what it was made from.

Each shard has a small file in `shards/`, written last: a shard without one is done again. `manifest.json` gathers them,
and is written by the one process that leads a run, so any number of workers may write shards. `errors.parquet` lists
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
from mixmim_serve.strict_json import parse_json

FORMAT = 1  # of a manifest; raised when an older reader would misread the folder
SAVE_EVERY = 30.0  # seconds between two manifests of a run
AT_ONCE = 16  # small files that are read side by side
_ERRORS_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("shard", pa.string())])


@dataclass(frozen=True)
class Origin:
    """What a folder of features is made from; all of it has to be the same in a later run."""

    bundle: str  # as it was given, for people and later commands; not compared
    source: str  # likewise
    about: Mapping[str, Any]  # see `table.about`
    options: Mapping[str, Any]
    images: int
    digest: str  # of the source

    def refuse_other(self, place: str, manifest: Mapping[str, Any]) -> None:
        """Compare with what a folder holds.

        Raises:
            OutputError: saying what differs, and what to do.
        """
        if manifest.get("format") != FORMAT:
            raise OutputError(
                f"{place} is of format {manifest.get('format')}, this version writes {FORMAT}: choose another folder."
            )
        if manifest["fingerprint"] != self.about["fingerprint"]:
            raise OutputError(
                f"{place} holds features {_made_by(manifest)}, not {_made_by(self.about)}: choose another folder, or "
                "that bundle and engine."
            )
        different = [name for name, value in manifest["options"].items() if self.options.get(name) != value]
        if different:
            values = ", ".join(f"{name} {manifest['options'][name]}" for name in different)
            raise OutputError(f"{place} was begun with other options ({values}): use those, or choose another folder.")
        if manifest["source"]["sha256"] != self.digest:
            raise OutputError(
                f"{self.source} is not what {place} was begun with (then {manifest['source']['images']:,} images, now "
                f"{self.images:,}; names or sizes differ): bring the old images back, or choose another folder."
            )


class Ledger:
    """The shards of a folder that are whole."""

    def __init__(self, folder: Folder, origin: Origin) -> None:
        """Read what is there, or begin.

        Raises:
            OutputError: the folder holds something else, or cannot be written to.
        """
        self.folder, self.origin = folder, origin
        self.whole: dict[str, ShardResult] = {}
        self.saved = 0.0
        found = folder.read_bytes(MANIFEST)
        if found is not None:
            origin.refuse_other(folder.place, read_manifest(folder, found))
            self.take_stock()
        elif folder.sizes(FEATURES):
            raise OutputError(f"{folder.place} holds features that no {MANIFEST} describes: choose another folder.")
        self.save(complete=False)

    def note(self, outcome: ShardResult) -> None:
        """A shard that was recorded, by whatever worker."""
        self.whole[outcome.shard] = outcome
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save(complete=False)

    @property
    def rows(self) -> int:
        """Of all shards that are whole."""
        return sum(outcome.rows for outcome in self.whole.values())

    @property
    def errors(self) -> int:
        """Images that could not be read."""
        return sum(len(outcome.errors) for outcome in self.whole.values())

    def save(self, *, complete: bool) -> None:
        """Write the manifest."""
        shards = [
            {"name": name, "images": each.images, "rows": each.rows, "errors": len(each.errors), "files": each.files}
            for name, each in sorted(self.whole.items())
        ]
        values = {
            "format": FORMAT,
            "complete": complete,
            **self.origin.about,
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
        """Write `errors.parquet`, which is there even when it is empty."""
        rows = [(key, why, name) for name, each in sorted(self.whole.items()) for key, why in each.errors]
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        table = pa.table([pa.array(column, pa.string()) for column in columns], schema=_ERRORS_SCHEMA)
        with self.folder.write(ERRORS) as path:
            pq.write_table(table, path)

    def take_stock(self) -> None:
        """Look which shards have been recorded, and still have all their files, as long as they were."""
        self.whole.clear()
        sizes: dict[str, int] = {}
        for below in (FEATURES, f"{DATASET}/data"):
            sizes |= self.folder.sizes(below)
        names = sorted(name for name in self.folder.sizes(LEDGER) if name.endswith(".json"))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for outcome in pool.map(self._recorded, names):
                if all(sizes.get(file) == about["bytes"] for file, about in outcome.files.items()):
                    self.whole[outcome.shard] = outcome

    def _recorded(self, name: str) -> ShardResult:
        values = parse_json(self.folder.read_bytes(name) or b"{}")
        return ShardResult(**values | {"errors": tuple((key, why) for key, why in values["errors"])})


def record(folder: Folder, outcome: ShardResult) -> None:
    """Write a shard's own file, after its features."""
    values = dataclasses.asdict(outcome)
    del values["busy"]
    folder.write_bytes(f"{LEDGER}/{outcome.shard}.json", (json.dumps(values, indent=1) + "\n").encode())


def read_manifest(folder: Folder, found: bytes | None = None) -> dict[str, Any]:
    """The manifest of a folder of features.

    Raises:
        OutputError: there is none, or it is not one of ours.
    """
    found = found if found is not None else folder.read_bytes(MANIFEST)
    if found is None:
        raise OutputError(f"{folder.place} holds no {MANIFEST}: expected a folder that `mixmim extract` wrote.")
    try:
        values: dict[str, Any] = parse_json(found)
        values["format"], values["fingerprint"], values["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder.path(MANIFEST)} is damaged or not ours: choose another folder.") from error
    return values


def _made_by(about: Mapping[str, Any]) -> str:
    return f"of {about['model']} by {about['engine']} in {about['precision']} (fingerprint {about['fingerprint'][:8]})"
