"""Tar shards in WebDataset's layout: `0001.jpg` next to `0001.cls` or `0001.json`, which contain its label.

A sample is all members whose paths agree up to the first dot of the file name; it may have several images. Opening
reads all headers of every shard once: about 45 seconds for a million labelled images on a local disk, and about as long
as a full download for shards at a URL. Reading an image is then one seek, or one request.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mixmim_serve.errors import DataError
from mixmim_serve.sources import storage
from mixmim_serve.sources.base import LABEL_NAMES, all_or_none, digest_of, run_of
from mixmim_serve.sources.names import is_hidden, is_image_name, readable
from mixmim_serve.sources.passed_over import sentence
from mixmim_serve.strict_json import parse_json

MAX_LABEL_BYTES = 1_000_000  # a longer .cls or .json is not a label
_LABEL_SUFFIXES = (".cls", ".json")
MAX_READ_BYTES = 4_000_000  # at once while indexing; a header that says it is longer is damaged


@dataclass(frozen=True, eq=False)
class TarSource:
    """Members of tar shards, by offset. The key is shard and member: `train-0.tar/0001.jpg`."""

    name: str
    keys: Sequence[str]
    labels: Sequence[str] | None
    runs: Sequence[range]  # one per shard
    shards: Sequence[str]  # the file of each run
    stamps: Sequence[tuple[int, str]]  # `storage.stamp` of each shard
    spans: NDArray[np.int64]  # (images, 2): offset and size in bytes
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def places(self) -> Sequence[str]:
        """See `Source.places`."""
        return self.shards

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
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
    """Open tar shards, indexing their members.

    Raises:
        DataError: a shard is missing, compressed, truncated or damaged, or none has an image.
    """
    indexed = zip(places, storage.key_names(places), storage.parallel_map(_index, places), strict=True)
    shards, passed_over = [], Counter[str]()
    for place, short, (stamp, members, others) in indexed:
        passed_over.update(others)
        shards += [(place, short, stamp, members)] if members else []
    if not shards:
        passed = f"; {sentence(passed_over)}" if passed_over else ""
        raise DataError(f"{name} has no images: expected members such as 0001.jpg next to 0001.cls{passed}.")
    ends = np.cumsum([len(members) for *_, members in shards]).tolist()
    return TarSource(
        name,
        keys=tuple(f"{short}/{member.name}" for _, short, _, members in shards for member in members),
        labels=all_or_none(member.label for *_, members in shards for member in members),
        runs=tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False)),
        shards=tuple(place for place, *_ in shards),
        stamps=tuple(stamp for _, _, stamp, _ in shards),
        spans=np.array([member.span for *_, members in shards for member in members], np.int64),
        passed_over=dict(passed_over.most_common()),
    )


def _index(place: str) -> tuple[tuple[int, str], list[_Member], Counter[str]]:
    """The stamp of a shard, its images, sorted by name, and its other members by suffix.

    Of duplicate names the last counts, as when unpacking.
    """
    stamp = storage.stamp(place)
    spans: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    others: Counter[str] = Counter()
    with storage.translated_errors(place, DataError), storage.open_seekable(place) as opened:
        file = _Bounded(opened)
        archive = _archive(place, file)
        try:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory: 0.5 kB each
                name = posixpath.normpath(member.name)
                if not member.isfile():
                    continue
                if not 0 <= member.size < 2**62:
                    raise tarfile.HeaderError("size")
                if is_image_name(name):
                    spans[name] = (member.offset_data, member.size)
                elif label := _label(name, archive, member):
                    labels[_sample(name)] = label
                elif not is_hidden(name):
                    others[_suffix(name)] += 1
            file.seek(archive.offset)  # tarfile takes a damaged header for the end of the archive
            is_complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, RecursionError, OverflowError, _TooLongError):
            is_complete = False
    if not is_complete:
        raise DataError(f"{place} is truncated or damaged: copy or write it again.")
    keys = readable(spans)
    others = Counter({suffix: count for suffix, count in others.items() if suffix not in _LABEL_SUFFIXES})
    return stamp, [_Member(keys[name], spans[name], labels.get(_sample(name))) for name in sorted(spans)], others


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
        raise DataError(
            f"{place} is not an uncompressed tar archive: decompress it, or choose another file."
        ) from error


def _sample(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _label(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The text of a .cls, or the first string or integer of a .json under one of `LABEL_NAMES`."""
    suffix = _suffix(name)
    content = archive.extractfile(member) if suffix in _LABEL_SUFFIXES and member.size <= MAX_LABEL_BYTES else None
    if content is None:
        return None
    text = content.read()
    try:
        if suffix == ".cls":
            return text.decode().strip()
        values = parse_json(text)
        return next(str(values[key]) for key in LABEL_NAMES if isinstance(values.get(key), str | int))
    except (ValueError, AttributeError, StopIteration):  # not text, not JSON, not an object, no such key
        return None
