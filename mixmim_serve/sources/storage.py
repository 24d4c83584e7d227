"""Reading of places: a place is a local path or a URL that fsspec supports (s3://, gs://, https://, memory://).

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

Value = TypeVar("Value")

AT_ONCE = 8  # shards opened in parallel: remote ones wait for the network


def is_url(place: str) -> bool:
    """Whether a place is a URL; so is `file://`, see `from_spec`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def from_spec(spec: str | Path) -> str:
    """The place that a user named; `file://` becomes a local path, which needs no fsspec."""
    return re.sub(r"^file://(localhost)?(?=/)", "", str(spec))


def without_query(place: str) -> str:
    """The place without the query of a web address; signed addresses have one after the file name."""
    return re.split(r"[?#]", place, maxsplit=1)[0] if place.startswith(("http://", "https://")) else place


def folder_of(place: str) -> str:
    """The place up to its last slash, such as `s3://bucket/`; empty without a slash."""
    return place[: without_query(place).rfind("/") + 1]


def join(folder: str, name: str) -> str:
    """The place of a file in a folder; with an empty name, the folder with a slash."""
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"


def short_names(places: Sequence[str]) -> list[str]:
    """Places without their common folder; of a single place, the file name."""
    shared = len(folder_of(os.path.commonprefix([without_query(place) for place in places])))  # noqa: RUF071 - cut at a slash
    return [without_query(place)[shared:] for place in places]


def has_wildcards(place: str) -> bool:
    """Whether a place is a pattern for `expand`, and not an existing local file that looks like one."""
    return re.search(r"[*?\[{]", without_query(place)) is not None and not os.path.exists(place)


def expand(pattern: str) -> list[str]:
    """The files that match a pattern, sorted: `train-*.tar`, `train-{000..127}.tar`, `{a,b}.parquet`.

    A name without `*`, `?` or `[...]` is returned unchanged, whether the file exists or not.

    Raises:
        DataError: when nothing matches.
    """
    places = sorted({place for plain in _braces(pattern) for place in _glob(plain)})
    if not places:
        raise DataError(f"no file matches {pattern}: check the pattern, and quote it in a shell.")
    return places


def list_files(folder: str) -> list[str]:
    """Like `mixmim_serve.sources.names.list_files`, for URLs too.

    Raises:
        DataError: a URL that cannot be listed.
    """
    if not is_url(folder):
        return list_local_files(Path(folder))
    with translated_errors(folder, DataError):
        filesystem, root = connect(folder)
        prefix = root.rstrip("/") + "/"
        names = [place.removeprefix(prefix) for place in filesystem.find(root) if place.startswith(prefix)]
    return sorted((name for name in names if not is_hidden(name)), key=lambda name: name.split("/"))


def open_binary(place: str) -> IO[bytes]:
    """Open a file to read from the start."""
    if not is_url(place):
        return open(place, "rb")
    filesystem, path = connect(place)
    file: IO[bytes] = filesystem.open(path, "rb")
    return file


def open_seekable(place: str) -> IO[bytes]:
    """Open a file to read at any position.

    Raises:
        DataError: the web server does not support range requests.
    """
    file = open_binary(place)
    if getattr(file, "size", 0) is None:  # fsspec's HTTP stream; it claims to be seekable until a seek fails
        file.close()
        raise DataError(f"{place} cannot be read in parts, its server ignores range requests: download the file first.")
    return file


def is_folder(place: str) -> bool:
    """Whether a folder exists; always True on the web, which has no folders."""
    if place.startswith(("http://", "https://")):
        return True
    if not is_url(place):
        return os.path.isdir(place)
    with translated_errors(place, DataError):
        filesystem, path = connect(place)
        return bool(filesystem.exists(path.rstrip("/")))


def local_size(place: str) -> int:
    """Size in bytes of a local file; -1 if it is missing or at a URL."""
    try:
        return -1 if is_url(place) else os.stat(place).st_size
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return -1


def stamp(place: str) -> tuple[int, str]:
    """Size in bytes of a file, and a time or tag that changes when it is rewritten.

    Raises:
        DataError: the file is gone or cannot be accessed.
    """
    with translated_errors(place, DataError):
        if not is_url(place):
            status = os.stat(place)
            return status.st_size, str(status.st_mtime_ns)
        filesystem, path = connect(place)
        info = filesystem.info(path)
        tags = (info.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "created"))
        return int(info.get("size") or 0), str(next((tag for tag in tags if tag), ""))


def check_stamp(place: str, opened: tuple[int, str]) -> None:
    """Compare a file with its `stamp` from when it was opened.

    Raises:
        DataError: it is gone or was altered.
    """
    if is_url(place):
        with translated_errors(place, DataError):
            connect(place)[0].invalidate_cache()
    if stamp(place) != opened:
        raise DataError(f"{place} was altered while it was being read: restore the old file, and run again.")


def read_image(place: str) -> bytes:
    """Read a file of at most `MAX_IMAGE_BYTES`; of a larger one at most one more byte is read.

    Raises:
        ImageError: see `mixmim_serve.preprocess.read_limited`.
    """
    if not is_url(place):
        return read_limited(place)
    with translated_errors(place, ImageError):
        data = _read(place, 0, MAX_IMAGE_BYTES + 1)
    check_size(place, len(data))
    return data


def read_part(place: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file, starting at `start`.

    Raises:
        ImageTooLargeError: more than `MAX_IMAGE_BYTES`; nothing is read.
        UndecodableImageError: the file is too short.
        ImageError: the file cannot be read.
    """
    check_size(place, size)
    with translated_errors(place, ImageError):
        data = _read(place, start, start + size)
    if len(data) != size:
        raise UndecodableImageError(
            f"{place} is shorter than when it was opened: leave the data unchanged, and run again."
        )
    return data


def check_size(place: str, size: int) -> None:
    """Check the size of an encoded image.

    Raises:
        ImageTooLargeError: more than `MAX_IMAGE_BYTES`.
    """
    if size > MAX_IMAGE_BYTES:
        raise ImageTooLargeError(f"{place}: the image has more than {MAX_IMAGE_BYTES:,} bytes: make it smaller.")


@contextlib.contextmanager
def translated_errors(place: str, error: type[MixMIMError]) -> Iterator[None]:
    """Turn any exception into `error` with one sentence; our own errors and missing packages pass unchanged."""
    try:
        yield
    except (MixMIMError, ModuleNotFoundError):
        raise
    except Exception as cause:  # every storage raises its own classes: OSError, aiohttp's, botocore's, pyarrow's
        raise error(f"cannot read {place}: {_reason(cause)}.") from cause


def parallel_map(function: Callable[[str], Value], places: Sequence[str]) -> list[Value]:
    """Call `function` for every place, `AT_ONCE` at a time; the first error is raised."""
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
    # cat_file would load the whole file from a server that ignores ranges. With a size, open() sends no request.
    with filesystem.open(path, "rb", size=end) as file:
        file.seek(start)
        return bytes(file.read(end - start))


def connect(place: str) -> tuple[Any, str]:
    """The file system of a place, and the path in it. fsspec caches one per process, and drops it after a fork."""
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
    """Expand all `{000..127}`, keeping leading zeros, and all `{a,b}` in a pattern."""
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
    with translated_errors(place, DataError):
        filesystem, path = connect(place)
        return [filesystem.unstrip_protocol(match) for match in filesystem.glob(path)]
