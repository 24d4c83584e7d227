"""Places that hold bytes: a local path, or a URL of anything that fsspec opens (s3://, gs://, https://, memory://).

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
from mixmim_serve.sources.names import is_hidden, readable
from mixmim_serve.sources.patterns import SearchLimit, braces, glob

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


def key_names(places: Sequence[str]) -> list[str]:
    """`short_names` as valid text, for keys."""
    names = short_names(places)
    spelt = readable(names)
    return [spelt[name] for name in names]


def has_wildcards(place: str) -> bool:
    """Whether it is a pattern for `expand`, and not a local file that happens to look like one."""
    return re.search(r"[*?\[{]", bare(place)) is not None and (is_url(place) or not local.exists(place))


def expand(pattern: str, limit: SearchLimit | None = None) -> list[str]:
    """The files that a pattern means, sorted: `train-*.tar`, `train-{000..127}.tar`, `{a,b}.parquet`.

    A name without `*`, `?` or `[...]` is taken as it is, whether the file is there or not.

    Raises:
        DataError: a pattern that nothing matches, or whose braces mean too many names.
    """
    limit = limit or SearchLimit()
    found = sorted({place for plain in braces(pattern, limit) for place in matches(plain, limit)})
    if not found:
        raise DataError(f"{pattern} means no file: check the pattern, and quote it if a shell reads it.")
    return found


def list_files(folder: str) -> list[str]:
    """What `mixmim_serve.sources.names.list_files` gives, also of a URL.

    Raises:
        DataError: a URL that cannot be listed.
    """
    if not is_url(folder):
        return sorted(local.walk(folder), key=lambda name: name.split("/"))
    with explained(folder, DataError):
        filesystem, root = connect(folder)
        prefix = root.rstrip("/") + "/"
        names = [place.removeprefix(prefix) for place in filesystem.find(root) if place.startswith(prefix)]
    return sorted((name for name in names if not is_hidden(name)), key=lambda name: name.split("/"))


def open_binary(place: str) -> IO[bytes]:
    """A file to read from the start."""
    if not is_url(place):
        return local.open_file(place)
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
        return local.is_folder(place)
    with explained(place, DataError):
        filesystem, path = connect(place)
        return bool(filesystem.exists(path.rstrip("/")))


def local_size(place: str) -> int:
    """Bytes of a local file; -1 for one that is missing, or behind a URL."""
    try:
        return -1 if is_url(place) else local.stat(place).st_size
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return -1


def stamp(place: str) -> tuple[int, str]:
    """Bytes of a file, and whatever changes when it is written anew: a time or a tag.

    Raises:
        DataError: it cannot be looked at, or is gone.
    """
    with explained(place, DataError):
        if not is_url(place):
            status = local.stat(place)
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
        ImageTooLargeError: it is larger.
        ImageError: it is missing, not readable or not a regular file.
    """
    if is_url(place):
        with explained(place, ImageError):
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
        raise too_large(place)


def too_large(place: str) -> ImageTooLargeError:
    """The error for an image of too many bytes."""
    return ImageTooLargeError(f"{place}: the image has more than {MAX_IMAGE_BYTES:,} bytes: make it smaller.")


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
        data = filesystem.cat_file(path, start=start, end=end)
        if start and len(data) > end - start:
            raise OSError("its storage does not send parts of a file")
        return bytes(data[: end - start])
    else:
        opened = open_binary(place)
    with opened as file:
        file.seek(start)
        return bytes(file.read(end - start))


def connect(place: str) -> tuple[Any, str]:
    """Of this process: fsspec keeps one a process, and forgets those from before a fork."""
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
    """The files that a pattern without braces means; of a name that is no pattern, itself."""
    if not has_wildcards(place):
        yield place
    elif not is_url(place):
        yield from glob(place, limit)
    else:
        with explained(place, DataError):
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
        place = response.headers.get("Location") or response.headers.get("URI") or ""
        target = response.url.join(type(response.url)(place))
        if not access.allows_url(str(target)):
            raise OutsideError(OUTSIDE)

    watch = aiohttp.TraceConfig()
    watch.on_request_redirect.append(check)
    return watch
