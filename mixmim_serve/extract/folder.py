"""The folder of results: local, or below a URL of anything that fsspec opens. Files in it are whole or not there.

Locally a file is written under a temporary name, flushed to the disk and renamed. Behind a URL it is written to this
machine's temporary folder and sent as one object, which object stores show only when they have all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixmim_serve.errors import DataError, MixMIMError, OutputError
from mixmim_serve.files import atomic_path, open_regular
from mixmim_serve.sources import storage

FEATURES, LEDGER = "features", "shards"  # folders: data, and what is known of each shard
DATASET = "features.lance"  # of Lance, in the place of `features`
MANIFEST, ERRORS = "manifest.json", "errors.parquet"

Files = dict[str, dict[str, Any]]  # name: bytes and sha256


class Folder:
    """Files by their names relative to the folder, `/` between parts."""

    def __init__(self, place: str | Path) -> None:
        self.place = storage.from_spec(place)
        self.is_url = storage.is_url(self.place)
        if not self.is_url:
            self.place = os.path.abspath(self.place)

    def path(self, name: str) -> str:
        """The place of a file."""
        return storage.below(self.place, name)

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A local path to write to; the file is in the folder when the block ends well, else nothing is.

        Raises:
            OutputError: it cannot be written, such as on a full disk.
        """
        with self.explained(name):
            if not self.is_url:
                with atomic_path(Path(self.path(name))) as temporary:
                    yield temporary
            else:
                filesystem, target = storage.connect(self.path(name))
                with tempfile.TemporaryDirectory(prefix="mixmim-") as folder:
                    temporary = Path(folder) / name.rpartition("/")[2]
                    yield temporary
                    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                    filesystem.put_file(str(temporary), target)

    def write_bytes(self, name: str, data: bytes) -> None:
        """A whole file.

        Raises:
            OutputError: it cannot be written.
        """
        with self.write(name) as path:
            path.write_bytes(data)

    def read_bytes(self, name: str) -> bytes | None:
        """A whole file; None if there is none.

        Raises:
            DataError: it cannot be read.
        """
        path = self.path(name)
        open_ = storage.open_binary if self.is_url else open_regular  # results lie outside the roots of a job
        with storage.explained(path, DataError), contextlib.suppress(FileNotFoundError), open_(path) as file:
            return file.read()
        return None

    def sizes(self, below: str) -> dict[str, int]:
        """Bytes of each file in one of its folders, by whole name."""
        if not self.is_url:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path(below)) as found:
                return {f"{below}/{each.name}": each.stat().st_size for each in found if each.is_file()}
            return {}
        with storage.explained(self.path(below), DataError):
            filesystem, path = storage.connect(self.path(below))
            filesystem.invalidate_cache()
            listed = filesystem.ls(path, detail=True) if filesystem.exists(path) else []
            return {f"{below}/{each['name'].rpartition('/')[2]}": each["size"] for each in listed}

    def remove(self, name: str) -> None:
        """A file that may not be there."""
        with self.explained(name), contextlib.suppress(FileNotFoundError):
            if self.is_url:
                filesystem, path = storage.connect(self.path(name))
                filesystem.rm_file(path)
            else:
                os.unlink(self.path(name))

    def clean(self) -> None:
        """Remove what writers that were killed left behind; only where no other run is under way."""
        if not self.is_url:
            for folder in ("", FEATURES, LEDGER):
                for path in Path(self.path(folder)).glob(".*.tmp"):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turn whatever fails while a file is written into an `OutputError`."""
        try:
            yield
        except (MixMIMError, ModuleNotFoundError):
            raise
        except Exception as error:  # OSError, pyarrow's, and whatever classes a storage has
            if not self.is_url and not isinstance(error, OSError):
                raise
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise OutputError(
                f"cannot write {self.path(name)}: {reason.splitlines()[0].rstrip('.') or type(error).__name__}; what "
                "was written before is whole, and the same command goes on from there."
            ) from error


def sha256_and_size(path: Path) -> tuple[str, int]:
    """Of a file that was just written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
