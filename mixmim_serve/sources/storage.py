"""Reading of places: a place is a local path or a URL that fsspec supports (s3://, gs://, https://, memory://).

Nothing stays open between calls, so that sources can be pickled, forked and read from threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from mixmim_serve.errors import (
    DataError,
    ImageError,
    ImageTooLargeError,
    MixMIMError,
    OutsideError,
    UndecodableImageError,
)
from mixmim_serve.preprocess import MAX_IMAGE_BYTES
from mixmim_serve.sources import local
from mixmim_serve.sources.confinement import OUTSIDE
from mixmim_serve.sources.names import is_hidden
from mixmim_serve.sources.patterns import SearchLimit, braces, glob

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
    return re.search(r"[*?\[{]", without_query(place)) is not None and (is_url(place) or not local.exists(place))


def expand(pattern: str, limit: SearchLimit | None = None) -> list[str]:
    """The files that match a pattern, sorted: `train-*.tar`, `train-{000..127}.tar`, `{a,b}.parquet`.

    A name without `*`, `?` or `[...]` is returned unchanged, whether the file exists or not.

    Raises:
        DataError: when nothing matches, or the braces stand for too many names.
    """
    limit = limit or SearchLimit()
    places = sorted({place for plain in braces(pattern, limit) for place in matches(plain, limit)})
    if not places:
        raise DataError(f"no file matches {pattern}: check the pattern, and quote it in a shell.")
    return places


def list_files(folder: str) -> list[str]:
    """Like `mixmim_serve.sources.names.list_files`, for URLs too.

    Raises:
        DataError: a URL that cannot be listed.
    """
    if not is_url(folder):
        return sorted(local.walk(folder), key=lambda name: name.split("/"))
    with translated_errors(folder, DataError):
        filesystem, root = connect(folder)
        prefix = root.rstrip("/") + "/"
        names = [place.removeprefix(prefix) for place in filesystem.find(root) if place.startswith(prefix)]
    return sorted((name for name in names if not is_hidden(name)), key=lambda name: name.split("/"))


def open_binary(place: str) -> IO[bytes]:
    """Open a file to read from the start."""
    if not is_url(place):
        return local.open_file(place)
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
        return local.is_folder(place)
    with translated_errors(place, DataError):
        filesystem, path = connect(place)
        return bool(filesystem.exists(path.rstrip("/")))


def local_size(place: str) -> int:
    """Size in bytes of a local file; -1 if it is missing or at a URL."""
    try:
        return -1 if is_url(place) else local.stat(place).st_size
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return -1


def stamp(place: str) -> tuple[int, str]:
    """Size in bytes of a file, and a time or tag that changes when it is rewritten.

    Raises:
        DataError: the file is gone or cannot be accessed.
    """
    with translated_errors(place, DataError):
        if not is_url(place):
            status = local.stat(place)
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
        ImageTooLargeError: it is larger.
        ImageError: it is missing, not readable or not a regular file.
    """
    if is_url(place):
        with translated_errors(place, ImageError):
            data = _read(place, 0, MAX_IMAGE_BYTES + 1)
    else:
        try:
            with local.open_file(place) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or "not a file name"
            raise ImageError(f"cannot read {place}: {reason.lower()}.") from error
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
    context = contextvars.copy_context()  # the threads may read what this one may
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda place: context.copy().run(function, place), places))


def _reason(cause: Exception) -> str:
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return str(text).splitlines()[0].rstrip(".")


def _read(place: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`, or fewer; never more, whatever a storage says or sends."""
    if place.startswith(("http://", "https://")):
        # cat_file would take the whole file from a server that ignores ranges. With a size, open() asks it nothing.
        filesystem, path = connect(place)
        opened: IO[bytes] = filesystem.open(path, "rb", size=end)
    elif is_url(place):
        filesystem, path = connect(place)
        return bytes(filesystem.cat_file(path, start=start, end=end)[: end - start])
    else:
        opened = open_binary(place)
    with opened as file:
        file.seek(start)
        return bytes(file.read(end - start))


def connect(place: str) -> tuple[Any, str]:
    """The file system of a place, and the path in it. fsspec caches one per process, and drops it after a fork."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    if not local.allows_url(place):
        raise OutsideError(OUTSIDE)
    try:
        filesystem, path = url_to_fs(place, **_options(place))
    except ImportError as error:
        scheme = place.partition("://")[0]
        package = known_implementations[scheme]["class"].partition(".")[0]
        missing = "aiohttp" if package == "fsspec" else package
        raise DataError(f"{place} needs a package that is not installed: run pip install {missing}.") from error
    return filesystem, str(path)


def matches(place: str, limit: SearchLimit) -> Iterator[str]:
    """The files that match a pattern without braces; a plain name is returned unchanged."""
    if not has_wildcards(place):
        yield place
    elif not is_url(place):
        yield from glob(place, limit)
    else:
        with translated_errors(place, DataError):
            filesystem, path = connect(place)
            yield from (filesystem.unstrip_protocol(name) for name in filesystem.glob(path))


def _options(place: str) -> dict[str, Any]:
    """Fsspec's options for a URL: a confined process follows no redirect out of its prefixes."""
    if not local.is_confined() or not place.startswith(("http://", "https://")):
        return {}
    return {"client_kwargs": {"trace_configs": [_watch_redirects(local.current())]}}


@functools.lru_cache(8)
def _watch_redirects(access: local.Access) -> Any:
    import aiohttp

    async def check(session: Any, context: Any, redirect: Any) -> None:
        response = redirect.response
        target = response.url.join(type(response.url)(response.headers.get("Location", "")))
        if not access.allows_url(str(target)):
            raise OutsideError(OUTSIDE)

    watch = aiohttp.TraceConfig()
    watch.on_request_redirect.append(check)
    return watch
