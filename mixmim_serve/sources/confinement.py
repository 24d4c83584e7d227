"""What a process may read that reads for others: files below some folders, URLs below some prefixes.

A path is walked from an open handle of its folder, one part at a time, and links are followed here instead of by the
kernel. So what is opened is what was checked: swapping a link in between leads nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from mixmim_serve.errors import OutsideError
from mixmim_serve.files import NO_LINK, READ_FLAGS, open_regular, regular

OUTSIDE = (
    "the source leads outside the roots of this server, by its name, a link or a list: name one whose files are all "
    "below a root."
)
MAX_LINKS = 40  # in one path, as in Linux
HAS_HANDLES = {os.open, os.stat, os.readlink} <= os.supports_dir_fd and os.scandir in os.supports_fd
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | NO_LINK
_PASS_FLAGS = _FOLDER_FLAGS | getattr(os, "O_PATH", 0)  # on Linux a folder can be passed without being readable


class Confinement:
    """See `mixmim_serve.sources.local.Access`.

    `folders` are absolute paths without links, `urls` prefixes that end with a slash. Relative paths are relative to
    `base`, one of the folders; without it they lie outside.
    """

    def __init__(self, folders: Sequence[Path], urls: Sequence[str], base: Path | None = None) -> None:
        self.folders, self.urls, self.base = folders, tuple(urls), base
        self.owner: Confinement | None = None  # of the handles, which are closed when nothing refers to it
        self.handles: dict[Path, int] = {}
        if HAS_HANDLES:
            self.handles |= {folder: os.open(folder, _FOLDER_FLAGS) for folder in folders}
        weakref.finalize(self, _close, self.handles)

    def at(self, base: Path | None) -> Confinement:
        """The same with another base."""
        confinement = copy.copy(self)
        confinement.base, confinement.owner = base, self
        return confinement

    def open(self, place: str) -> IO[bytes]:
        """A regular file.

        Raises:
            OSError: it is missing, not readable or not a regular file.
            OutsideError: it lies outside.
        """
        if not HAS_HANDLES:
            return open_regular(self._resolved(place))
        with self._parent(place) as (handle, name):
            return regular(os.open(name, READ_FLAGS | NO_LINK, dir_fd=handle), place)

    def stat(self, place: str) -> os.stat_result:
        """What a place leads to; raises as `open`."""
        if not HAS_HANDLES:
            return os.stat(self._resolved(place))
        with self._parent(place) as (handle, name):
            return os.stat(name, dir_fd=handle, follow_symlinks=False)

    @contextlib.contextmanager
    def scan(self, place: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """The entries of a folder; raises as `open`."""
        if not HAS_HANDLES:
            with os.scandir(self._resolved(place)) as entries:
                yield entries
            return
        with self._folder(place) as handle, os.scandir(handle) as entries:
            yield entries

    def check(self, places: Iterable[str]) -> None:
        """Check that none of these places lies outside; missing ones may be anywhere below a folder.

        Raises:
            OutsideError: one does.
        """
        for folder, group in itertools.groupby(places, os.path.dirname):
            with contextlib.suppress(OSError, ValueError):
                for place in self._links(folder, group):
                    with contextlib.suppress(OSError, ValueError):
                        self.stat(place)

    def _links(self, folder: str, places: Iterable[str]) -> Iterator[str]:
        """Those places in a folder that have to be followed to say where they lead; the folder is walked once."""
        if not HAS_HANDLES:
            yield from places
            return
        with self._folder(folder or ".") as handle:
            for place in places:
                name = os.path.basename(place)
                if name in ("", ".", "..") or _link(name, handle) is not None:
                    yield place

    def allows_url(self, url: str) -> bool:
        """Whether a URL is below a prefix, however a server may decode its path."""
        decoded = unquote(unquote(url)).replace("\\", "/")
        parts = decoded.split("/")
        return url.startswith(self.urls) and url.isprintable() and ".." not in parts and "::" not in decoded

    @contextlib.contextmanager
    def _folder(self, place: str) -> Iterator[int]:
        """A handle of a folder."""
        with self._parent(place) as (parent, name):
            handle = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _parent(self, place: str) -> Iterator[tuple[int, str]]:
        """A handle of the folder that holds what a place leads to, and its name there, which is not a link."""
        walk = _Walk(self, place)
        try:
            yield walk.run()
        finally:
            walk.close()

    def split(self, path: str) -> tuple[Path, list[str]]:
        """The folder that holds a path, and the parts below it.

        Raises:
            OutsideError: no folder holds it.
        """
        if not os.path.isabs(path):
            if self.base is None:
                raise OutsideError(OUTSIDE)
            return self.base, path.split("/")
        for candidate in (path, os.path.realpath(path)):  # the real path is only a hint: the walk is what decides
            for folder in self.folders:
                if candidate == str(folder) or candidate.startswith(os.path.join(folder, "")):
                    return folder, candidate[len(str(folder)) :].split("/")
        raise OutsideError(OUTSIDE)

    def _resolved(self, place: str) -> str:
        """The real path, where the operating system has no handles of folders."""
        folder, parts = self.split(place)
        path = os.path.realpath(os.path.join(folder, *parts))
        if not any(Path(path).is_relative_to(folder) for folder in self.folders):
            raise OutsideError(OUTSIDE)
        return path


class _Walk:
    """From a folder of the confinement to what a path means, through handles; close it."""

    def __init__(self, confinement: Confinement, place: str) -> None:
        self.confinement = confinement
        self.handles: list[int] = []  # of the folders below the root that lead to the current one
        self.pending: deque[str] = deque()
        self.root = Path()
        self._start(place)

    def run(self) -> tuple[int, str]:
        """Handle and name, as `Confinement._parent`."""
        links = 0
        while self.pending:
            name = self.pending.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                self._up()
            elif target := _link(name, self.handle):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
                self._follow(target)
            elif any(part not in ("", ".") for part in self.pending):
                self.handles.append(os.open(name, _PASS_FLAGS, dir_fd=self.handle))
            else:
                return self.handle, name
        return self.handle, "."

    def close(self) -> None:
        """Close the handles."""
        while self.handles:
            os.close(self.handles.pop())

    @property
    def handle(self) -> int:
        """Of the current folder."""
        return self.handles[-1] if self.handles else self.confinement.handles[self.root]

    def _start(self, path: str) -> None:
        """Begin anew at the folder that holds a path."""
        self.close()
        self.root, parts = self.confinement.split(path)
        self.pending.extendleft(reversed(parts))

    def _up(self) -> None:
        if self.handles:
            os.close(self.handles.pop())
        else:  # out of this folder; another one may hold the rest
            rest, self.pending = os.path.join(self.root.parent, *self.pending), deque()
            self._start(rest)

    def _follow(self, target: str) -> None:
        if not os.path.isabs(target):
            self.pending.extendleft(reversed(target.split("/")))
            return
        rest, self.pending = os.path.join(target, *self.pending), deque()
        self._start(rest)


def _link(name: str, folder: int) -> str | None:
    """Where a link in a folder leads; None for anything else, and for what is missing."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


def _close(handles: dict[Path, int]) -> None:
    for handle in handles.values():
        os.close(handle)
