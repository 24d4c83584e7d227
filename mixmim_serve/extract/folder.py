"""The output folder: local, or at a URL of any storage that fsspec supports. Files in it are written atomically.

A local file is written under a temporary name, flushed to disk and renamed. A file at a URL is written to this
machine's temporary folder and uploaded as one object, which object stores show only once it is complete.
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

FEATURES, LEDGER = "features", "shards"  # folders: data, and a record per shard
DATASET = "features.lance"  # with Lance, instead of `features`
MANIFEST, ERRORS = "manifest.json", "errors.parquet"

Files = dict[str, dict[str, Any]]  # name: size in bytes, sha256


class Folder:
    """Files by their names relative to the folder, with `/` between parts."""

    def __init__(self, place: str | Path) -> None:
        self.place = storage.from_spec(place)
        self.is_url = storage.is_url(self.place)
        if not self.is_url:
            self.place = os.path.abspath(self.place)

    def path(self, name: str) -> str:
        """The path or URL of a file."""
        return storage.join(self.place, name)

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A local path to write to; the file appears in the folder when the block succeeds, and not when it raises.

        Raises:
            OutputError: it cannot be written, for example because the disk is full.
        """
        with self.translated_errors(name):
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
        """Write a file.

        Raises:
            OutputError: it cannot be written.
        """
        with self.write(name) as path:
            path.write_bytes(data)

    def read_bytes(self, name: str) -> bytes | None:
        """Read a file; None if it does not exist.

        Raises:
            DataError: it cannot be read.
        """
        path = self.path(name)
        open_ = storage.open_binary if self.is_url else open_regular  # results lie outside the roots of a job
        with storage.translated_errors(path, DataError), contextlib.suppress(FileNotFoundError), open_(path) as file:
            return file.read()
        return None

    def sizes(self, below: str) -> dict[str, int]:
        """Size in bytes of each file in a subfolder, by its name in this folder."""
        if not self.is_url:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path(below)) as entries:
                return {f"{below}/{entry.name}": entry.stat().st_size for entry in entries if entry.is_file()}
            return {}
        with storage.translated_errors(self.path(below), DataError):
            filesystem, path = storage.connect(self.path(below))
            filesystem.invalidate_cache()
            infos = filesystem.ls(path, detail=True) if filesystem.exists(path) else []
            return {f"{below}/{info['name'].rpartition('/')[2]}": info["size"] for info in infos}

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        with self.translated_errors(name), contextlib.suppress(FileNotFoundError):
            if self.is_url:
                filesystem, path = storage.connect(self.path(name))
                filesystem.rm_file(path)
            else:
                os.unlink(self.path(name))

    def clean(self) -> None:
        """Delete temporary files of killed writers; only while holding the folder's lock."""
        if not self.is_url:
            for folder in ("", FEATURES, LEDGER):
                for path in Path(self.path(folder)).glob(".*.tmp"):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def translated_errors(self, name: str) -> Iterator[None]:
        """Turn any failure to write a file into an `OutputError`."""
        try:
            yield
        except (MixMIMError, ModuleNotFoundError):
            raise
        except Exception as error:  # OSError, pyarrow's, and those of each storage
            if not self.is_url and not isinstance(error, OSError):
                raise
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise OutputError(
                f"cannot write {self.path(name)}: {reason.splitlines()[0].rstrip('.') or type(error).__name__}; all "
                "shards written so far are complete: run the same command again to resume."
            ) from error


def sha256_and_size(path: Path) -> tuple[str, int]:
    """Hex digest and size in bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
