"""What jobs may read: the folders and URLs that the operator named, and everything below them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixmim_serve.errors import ConfigError, DataError, OutsideError, quoted
from mixmim_serve.sources import Source, local, storage
from mixmim_serve.sources.confinement import OUTSIDE, Confinement
from mixmim_serve.sources.patterns import SearchLimit, braces, fixed_part, glob

MAX_NAME = 4096  # characters of a source's name
MAX_NAMES = 10_000  # that its braces may mean


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
        self.confinement = Confinement(self.folders, self.urls)

    def find(self, source: str, limit: SearchLimit | None = None) -> tuple[Path | None, str]:
        """The root that holds a source, and the source's name relative to it; no root for a URL.

        The source is relative to one of the roots (the first that has it), or a whole path or URL. Its braces are
        counted out before each place is checked. A source outside and one that does not exist give the same error, so
        that a client cannot probe what else a machine has.

        Raises:
            DataError: when there is no such source, or it cannot be found within the limit.
        """
        limit = limit or SearchLimit(names=MAX_NAMES)
        parts = re.split(r"[/\\{},]", source)
        if source and len(source) <= MAX_NAME and source.isprintable() and ".." not in parts and "::" not in source:
            for folder, name in self._candidates(source):
                if self._holds(folder, name, limit):
                    return folder, name
        raise DataError(
            f"unknown source {quoted(source)}: name a folder, file or pattern below the roots of this server."
        )

    def check(self, source: Source, base: Path | None) -> None:
        """Refuse a source that reads outside the roots, through a link or a list of paths.

        This refuses it before its first image is read. What holds whatever happens later is the confinement.

        Raises:
            OutsideError: a place is outside.
        """
        confinement = self.confinement.at(base)
        for url in filter(storage.is_url, source.places):
            if not confinement.allows_url(url):
                raise OutsideError(OUTSIDE)
        confinement.check(place for place in source.places if not storage.is_url(place))

    def _candidates(self, source: str) -> Iterator[tuple[Path | None, str]]:
        if storage.is_url(source):
            yield None, source
            return
        for folder in self.folders:
            if not os.path.isabs(source):
                yield folder, source
            elif f"{source}/".startswith(os.path.join(folder, "")):
                yield folder, source[len(str(folder)) :].strip("/") or "."

    def _holds(self, base: Path | None, name: str, limit: SearchLimit) -> bool:
        """Whether all places that a name means are inside, and at least one of them exists."""
        found = False
        with local.confined(self.confinement.at(base)):
            for place in braces(name, limit) if storage.has_wildcards(name) else (name,):
                limit.check()
                try:
                    found |= _exists(place, limit)
                except OutsideError:
                    return False
        return found


def _exists(place: str, limit: SearchLimit) -> bool:
    """Whether a place without braces exists; a URL is taken as existing.

    Raises:
        OutsideError: it is outside.
    """
    if storage.is_url(place):
        if not local.allows_url(place):
            raise OutsideError(OUTSIDE)
        return True
    is_pattern = storage.has_wildcards(place)
    try:
        local.stat(fixed_part(place) or "." if is_pattern else place)
    except (OSError, ValueError):
        return False
    return not is_pattern or any(map(local.exists, glob(place, limit)))
