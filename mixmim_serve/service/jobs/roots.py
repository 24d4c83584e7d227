"""What jobs may read: the folders and URLs that the operator named, and everything below them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mixmim_serve.errors import ConfigError, DataError, quoted
from mixmim_serve.sources import Source, storage

MAX_NAME = 4096  # characters of a source's name


class Roots:
    """Local folders, by their real paths, and URLs.

    Raises:
        ConfigError: when a local root is not a folder.
    """

    def __init__(self, roots: Iterable[str]) -> None:
        places = [storage.from_spec(root) for root in roots]
        self.urls = tuple(storage.join(place, "") for place in places if storage.is_url(place))
        folders = [place for place in places if not storage.is_url(place)]
        for place in folders:
            if not os.path.isdir(place):
                raise ConfigError(f"{place} is not a folder: --jobs-root takes a folder that jobs may read, or a URL.")
        self.folders = tuple(Path(place).resolve() for place in folders)

    def find(self, source: str) -> tuple[Path | None, str]:
        """The root that holds a source, and the source's name relative to it; no root for a URL.

        The source is relative to one of the roots (the first that has it), or a whole path or URL. A source outside
        and one that does not exist give the same error, so that a client cannot probe what else a machine has.

        Raises:
            DataError: when there is no such source.
        """
        parts = re.split(r"[/\\{},]", source)
        if source and len(source) <= MAX_NAME and source.isprintable() and ".." not in parts and "::" not in source:
            if storage.is_url(source):
                if source.startswith(self.urls):
                    return None, source
            else:
                for folder in self.folders:
                    name = os.path.relpath(source, folder) if os.path.isabs(source) else source
                    if not name.startswith("..") and _exists_below(folder, name):
                        return folder, name
        raise DataError(
            f"unknown source {quoted(source)}: name a folder, file or pattern below the roots of this server."
        )

    def check(self, source: Source) -> None:
        """Refuse a source that reads outside the roots, through a link or a list of paths.

        Names are relative to the current folder.

        Raises:
            DataError: naming the place.
        """
        real: dict[str, str] = {}  # path of each folder; a million images share few
        for place in source.places:
            if storage.is_url(place):
                inside = place.startswith(self.urls) and ".." not in place.split("/") and "::" not in place
            else:
                folder, _, name = place.rpartition("/")
                if folder not in real:
                    real[folder] = os.path.realpath(folder or ".")
                path = os.path.realpath(place) if os.path.islink(place) or name == ".." else f"{real[folder]}/{name}"
                inside = self._holds(path)
            if not inside:
                raise DataError(f"{source.name} names {place}, which is outside the roots of this server.")

    def _holds(self, path: str) -> bool:
        return any(Path(path).is_relative_to(folder) for folder in self.folders)


def _exists_below(folder: Path, name: str) -> bool:
    place = str(folder / name)
    if not storage.has_wildcards(place):
        return os.path.exists(place) and Path(place).resolve().is_relative_to(folder)
    try:
        return all(Path(match).resolve().is_relative_to(folder) for match in storage.expand(place))
    except DataError:
        return False
