"""Places that hold bytes: a local path, or a URL of anything that fsspec opens (s3://, gs://, https://, memory://).

Nothing stays open between calls, so that sources can be pickled, forked and read from threads.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from mixmim_serve.errors import DataError, ImageError, ImageTooLargeError, MixMIMError, UndecodableImageError
from mixmim_serve.preprocess import MAX_IMAGE_BYTES, read_limited
from mixmim_serve.sources.names import is_hidden
from mixmim_serve.sources.names import list_files as list_local_files

T = TypeVar("T")

AT_ONCE = 8  # shards that are opened side by side: remote ones wait for the network


def is_url(place: str) -> bool:
    """Whether a place is a URL; `file://` is one too, see `from_spec`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def from_spec(spec: str | Path) -> str:
    """The place that a user named; `file://` becomes the local path, for which fsspec is not needed."""
    return re.sub(r"^file://(localhost)?(?=/)", "", str(spec))


def bare(place: str) -> str:
    """Without the query of a web address: signed addresses carry one behind the file's name."""
    return re.split(r"[?#]", place, maxsplit=1)[0] if place.startswith(("http://", "https://")) else place


def folder_of(place: str) -> str:
    """What stands before the last part of a place, with its slash: `s3://bucket/`, or nothing."""
    return place[: bare(place).rfind("/") + 1]


def below(folder: str, name: str) -> str:
    """The place of a file by its name relative to a folder; also of the folder itself, with its slash, by no name."""
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"


def short_names(places: Sequence[str]) -> list[str]:
    """Places without the folder that all share; of a single one the file's name."""
    shared = len(folder_of(os.path.commonprefix([bare(place) for place in places])))  # noqa: RUF071 - cut at a slash
    return [bare(place)[shared:] for place in places]


def has_wildcards(place: str) -> bool:
    """Whether it is a pattern for `expand`, and not a local file that happens to look like one."""
    return re.search(r"[*?\[{]", bare(place)) is not None and not os.path.exists(place)


def expand(pattern: str) -> list[str]:
    """The files that a pattern means, sorted: `train-*.tar`, `train-{000..127}.tar`, `{a,b}.parquet`.

    A name without `*`, `?` or `[...]` is taken as it is, whether the file is there or not.

    Raises:
        DataError: a pattern that nothing matches.
    """
    found = sorted({place for plain in _braces(pattern) for place in _glob(plain)})
    if not found:
        raise DataError(f"{pattern} means no file: check the pattern, and quote it if a shell reads it.")
    return found


def list_files(folder: str) -> list[str]:
    """What `mixmim_serve.sources.names.list_files` gives, also of a URL.

    Raises:
        DataError: a URL that cannot be listed.
    """
    if not is_url(folder):
        return list_local_files(Path(folder))
    with explained(folder, DataError):
        filesystem, root = connect(folder)
        prefix = root.rstrip("/") + "/"
        names = [place.removeprefix(prefix) for place in filesystem.find(root) if place.startswith(prefix)]
    return sorted((name for name in names if not is_hidden(name)), key=lambda name: name.split("/"))


def open_binary(place: str) -> IO[bytes]:
    """A file to read from the start."""
    if not is_url(place):
        return open(place, "rb")
    filesystem, path = connect(place)
    file: IO[bytes] = filesystem.open(path, "rb")
    return file


def open_seekable(place: str) -> IO[bytes]:
    """A file to read at any position.

    Raises:
        DataError: a web server that sends files only whole.
    """
    file = open_binary(place)
    if getattr(file, "size", 0) is None:  # fsspec's stream over HTTP; it calls itself seekable until a seek fails
        file.close()
        raise DataError(f"{place} cannot be read in parts, the server does not offer it: download the file first.")
    return file


def is_folder(place: str) -> bool:
    """Whether a folder is there; of the web, which has none, always."""
    if place.startswith(("http://", "https://")):
        return True
    if not is_url(place):
        return os.path.isdir(place)
    with explained(place, DataError):
        filesystem, path = connect(place)
        return bool(filesystem.exists(path.rstrip("/")))


def local_size(place: str) -> int:
    """Bytes of a local file; -1 for one that is missing, or behind a URL."""
    try:
        return -1 if is_url(place) else os.stat(place).st_size
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return -1


def stamp(place: str) -> tuple[int, str]:
    """Bytes of a file, and whatever changes when it is written anew: a time or a tag.

    Raises:
        DataError: it cannot be looked at, or is gone.
    """
    with explained(place, DataError):
        if not is_url(place):
            status = os.stat(place)
            return status.st_size, str(status.st_mtime_ns)
        filesystem, path = connect(place)
        about = filesystem.info(path)
        tags = (about.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "created"))
        return int(about.get("size") or 0), str(next((tag for tag in tags if tag), ""))


def check_stamp(place: str, opened: tuple[int, str]) -> None:
    """Compare a file with what `stamp` said when it was opened.

    Raises:
        DataError: it is gone or was altered.
    """
    if is_url(place):
        with explained(place, DataError):
            connect(place)[0].invalidate_cache()
    if stamp(place) != opened:
        raise DataError(f"{place} was altered while it was read: bring the old file back, and run again.")


def read_image(place: str) -> bytes:
    """A whole file of at most `MAX_IMAGE_BYTES`; no more than that is read.

    Raises:
        ImageError: see `mixmim_serve.preprocess.read_limited`.
    """
    if not is_url(place):
        return read_limited(place)
    with explained(place, ImageError):
        data = _read(place, 0, MAX_IMAGE_BYTES + 1)
    check_size(place, len(data))
    return data


def read_part(place: str, start: int, size: int) -> bytes:
    """`size` bytes from the byte `start` on.

    Raises:
        ImageTooLargeError: more than `MAX_IMAGE_BYTES`; nothing is read.
        UndecodableImageError: the file ends before.
        ImageError: the file cannot be read.
    """
    check_size(place, size)
    with explained(place, ImageError):
        data = _read(place, start, start + size)
    if len(data) != size:
        raise UndecodableImageError(f"{place} is shorter than when it was opened: run again without changing the data.")
    return data


def check_size(place: str, size: int) -> None:
    """Refuse an image of too many bytes."""
    if size > MAX_IMAGE_BYTES:
        raise ImageTooLargeError(f"{place}: the image has more than {MAX_IMAGE_BYTES:,} bytes: make it smaller.")


@contextlib.contextmanager
def explained(place: str, error: type[MixMIMError]) -> Iterator[None]:
    """Turn whatever fails inside into one sentence; our own errors and missing packages pass."""
    try:
        yield
    except (MixMIMError, ModuleNotFoundError):
        raise
    except Exception as cause:  # every storage has classes of its own: OSError, aiohttp's, botocore's, pyarrow's
        raise error(f"cannot read {place}: {_reason(cause)}.") from cause


def each(function: Callable[[str], T], places: Sequence[str]) -> list[T]:
    """`function` of every place, `AT_ONCE` of them at a time; the first error ends it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, places))


def _reason(cause: Exception) -> str:
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return str(text).splitlines()[0].rstrip(".")


def _read(place: str, start: int, end: int) -> bytes:
    if not is_url(place):
        with open(place, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    filesystem, path = connect(place)
    if not place.startswith(("http://", "https://")):
        return bytes(filesystem.cat_file(path, start=start, end=end))
    # cat_file would take the whole file from a server that ignores ranges. With a size, open() asks the server nothing.
    with filesystem.open(path, "rb", size=end) as file:
        file.seek(start)
        return bytes(file.read(end - start))


def connect(place: str) -> tuple[Any, str]:
    """Of this process: fsspec keeps one a process, and forgets those from before a fork."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        filesystem, path = url_to_fs(place)
    except ImportError as error:
        scheme = place.partition("://")[0]
        package = known_implementations[scheme]["class"].partition(".")[0]
        missing = "aiohttp" if package == "fsspec" else package
        raise DataError(f"{place} needs a package that is not installed: run pip install {missing}.") from error
    return filesystem, str(path)


def _braces(pattern: str) -> Iterator[str]:
    """`{000..127}` counted out with as many digits, `{a,b}` chosen from, any number of them."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        yield pattern
        return
    choices = group[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        choices = [f"{n:0{len(numbers[1])}}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    for choice in choices:
        yield from _braces(pattern[: group.start()] + choice + pattern[group.end() :])


def _glob(place: str) -> list[str]:
    if not has_wildcards(place):
        return [place]
    if not is_url(place):
        return glob.glob(place, recursive=True)
    with explained(place, DataError):
        filesystem, path = connect(place)
        return [filesystem.unstrip_protocol(found) for found in filesystem.glob(path)]
