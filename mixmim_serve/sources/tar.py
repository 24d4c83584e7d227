"""Tar shards in the layout of WebDataset: `0001.jpg` beside `0001.cls` or `0001.json`, which hold its label.

A sample is the members that share their path up to the first dot of the file's name; each of its images counts.
Opening reads all headers of every shard once: some 45 seconds for a million images with labels on a local disk, and
about as long as a full download for shards behind a URL. Reading is then one seek, or one request.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import DataError
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, complete, digest_of, run_of
from mixmim_serve.sources.names import is_image_name, readable
from mixmim_serve.strict_json import parse_json

MAX_LABEL_BYTES = 1_000_000  # a longer .cls or .json is no label
MAX_READ_BYTES = 4_000_000  # at once while indexing; a header that says it is longer is damaged


@dataclass(frozen=True, eq=False)
class TarSource:
    """Members of tar shards, by position. The key is shard and member: `train-0.tar/0001.jpg`."""

    name: str
    keys: Sequence[str]
    labels: Sequence[str] | None
    runs: Sequence[range]  # one a shard
    shards: Sequence[str]  # the place of each run
    stamps: Sequence[tuple[int, str]]  # of each shard, as `storage.stamp` gives it
    spans: NDArray[np.int64]  # (images, 2): first byte and size

    @property
    def places(self) -> Sequence[str]:
        """See `Source.places`."""
        return self.shards

    def read(self, index: int) -> bytes:
        """The encoded image; see `Source.read`."""
        start, size = self.spans[index].tolist()
        return storage.read_part(self.shards[run_of(self.runs, index)], start, size)

    def check(self, index: int) -> None:
        """See `Source.check`."""
        run = run_of(self.runs, index)
        storage.check_stamp(self.shards[run], self.stamps[run])

    def digest(self) -> str:
        """See `Source.digest`."""
        return digest_of(self.keys, [self.spans.astype("<i8").tobytes()])


@dataclass(frozen=True)
class _Member:
    name: str
    span: tuple[int, int]
    label: str | None


def open_tar(name: str, places: Sequence[str]) -> TarSource:
    """Index the shards.

    Raises:
        DataError: a shard is missing, compressed, cut short or damaged, or none holds an image.
    """
    indexed = zip(places, storage.key_names(places), storage.each(_index, places), strict=True)
    shards = [(place, short, stamp, members) for place, short, (stamp, members) in indexed if members]
    if not shards:
        raise DataError(f"{name} holds no images: expected members such as 0001.jpg beside 0001.cls.")
    ends = np.cumsum([len(members) for *_, members in shards]).tolist()
    return TarSource(
        name,
        keys=tuple(f"{short}/{member.name}" for _, short, _, members in shards for member in members),
        labels=complete(member.label for *_, members in shards for member in members),
        runs=tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        shards=tuple(place for place, *_ in shards),
        stamps=tuple(stamp for _, _, stamp, _ in shards),
        spans=np.array([member.span for *_, members in shards for member in members], np.int64),
    )


def _index(place: str) -> tuple[tuple[int, str], list[_Member]]:
    """The stamp and images of one shard, by name; of members with one name the last counts, as when it is unpacked."""
    stamp = storage.stamp(place)
    spans: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    with storage.explained(place, DataError), storage.open_seekable(place) as opened:
        file = _Bounded(opened)
        archive = _archive(place, file)
        try:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header: 0.5 kB a member
                name = posixpath.normpath(member.name)
                if not member.isfile():
                    continue
                if not 0 <= member.size < 2**62:
                    raise tarfile.HeaderError("size")
                if is_image_name(name):
                    spans[name] = (member.offset_data, member.size)
                elif label := _label(name, archive, member):
                    labels[_sample(name)] = label
            file.seek(archive.offset)  # tarfile takes a damaged header for the end: look for the true one
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, RecursionError, OverflowError, _TooLongError):
            whole = False
    if not whole:
        raise DataError(f"{place} is cut short or damaged: copy it again, or write it anew.")
    keys = readable(spans)
    return stamp, [_Member(keys[name], spans[name], labels.get(_sample(name))) for name in sorted(spans)]


class _TooLongError(Exception):
    """A header claims to be longer than any of ours."""


class _Bounded:
    """A file that is not read beyond `MAX_READ_BYTES` at once, whatever a header says."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes.

        Raises:
            _TooLongError: more are asked for than any header of ours has.
        """
        if not 0 <= size <= MAX_READ_BYTES:
            raise _TooLongError
        return self.file.read(size)


def _archive(place: str, file: _Bounded) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload,no-any-return]
    except (tarfile.TarError, RecursionError, OverflowError, _TooLongError) as error:
        raise DataError(f"{place} is not a tar archive, or a compressed one: give an uncompressed .tar.") from error


def _sample(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _label(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The text of a .cls, or the string or whole number under a known key of a .json."""
    suffix = os.path.splitext(name)[1].lower()
    content = archive.extractfile(member) if suffix in (".cls", ".json") and member.size <= MAX_LABEL_BYTES else None
    if content is None:
        return None
    text = content.read()
    try:
        if suffix == ".cls":
            return text.decode().strip()
        about = parse_json(text)
        return next(str(about[key]) for key in LABEL_NAMES if isinstance(about.get(key), str | int))
    except (ValueError, AttributeError, StopIteration):  # no text, no JSON, no object, no such key
        return None
