"""Hostile files as sources: names, headers and sizes that lie. Each is one sentence, of the file or of one image."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from extracting import features, small
from fsspec.implementations.memory import MemoryFileSystem

from mixmim_serve.engines import Engine
from mixmim_serve.errors import DataError, ImageError, ImageTooLargeError
from mixmim_serve.preprocess import MAX_IMAGE_BYTES
from mixmim_serve.sources import open_source, parquet, storage, tar
from mixmim_serve.sources.names import as_text, readable
from mixmim_serve.sources.patterns import SearchLimit
from mixmim_serve.sources.patterns import glob as our_glob

HAT = (REPOSITORY / "examples" / "hat.jpg").read_bytes()


def write_tar(path: Path, members: dict[bytes, bytes]) -> Path:
    """A tar file with names in any bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name.decode(errors="surrogateescape"))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# Names that are not UTF-8.


def test_members_with_names_that_are_not_text_are_extracted(engine: Engine, tmp_path: Path) -> None:
    names = [b"caf\xe9.jpg", b"caf\\xe9.jpg", b"caf\xc3\xa9.jpg", b"\xff\xfe/\x80.jpg"]
    source = write_tar(tmp_path / "x.tar", dict.fromkeys(names, HAT) | {b"bad\xe9.jpg": b"no image"})
    summary = features(small(engine, source, tmp_path / "out", max_failures=1.0), engine)
    assert (summary.rows, summary.errors) == (4, 1)
    keys = pq.read_table(tmp_path / "out" / "features" / "000000.parquet")["key"].to_pylist()
    assert sorted(keys) == sorted(
        ["x.tar/caf\\xe9~2.jpg", "x.tar/caf\\xe9.jpg", "x.tar/café.jpg", "x.tar/\\xff\\xfe/\\x80.jpg"]
    )
    assert pq.read_table(tmp_path / "out" / "errors.parquet")["key"].to_pylist() == ["x.tar/bad\\xe9.jpg"]
    assert list(open_source(source).keys) == list(open_source(source).keys)


def test_files_with_names_that_are_not_text_are_extracted(engine: Engine, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos")
    os.makedirs(folder + b"/d\xe9")
    for name, data in ((b"/d\xe9/caf\xe9.jpg", HAT), (b"/hat.jpg", HAT), (b"/bad\xe9.jpg", b"no image")):
        Path(os.fsdecode(folder + name)).write_bytes(data)
    summary = features(small(engine, tmp_path / "photos", tmp_path / "out", max_failures=1.0), engine)
    assert (summary.rows, summary.errors) == (2, 1)
    keys = pq.read_table(tmp_path / "out" / "features" / "000000.parquet")["key"].to_pylist()
    assert keys == ["d\\xe9/caf\\xe9.jpg", "hat.jpg"]
    shard = write_tar(Path(os.fsdecode(folder + b"/\xe9.tar")), {b"\xe9.jpg": HAT})
    assert open_source(shard).keys == ("\\xe9.tar/\\xe9.jpg",)


def test_readable_names_are_unique_and_text() -> None:
    odd = [b"\xe9", b"\\xe9", b"\\xe9~2", b"\xc3\xa9", b"\xc3", b"\xed\xa0\x80"]
    names = [name.decode(errors="surrogateescape") for name in odd] + ["\ud800"]
    spelt = readable(names)
    assert len(set(spelt.values())) == len(names) == len(spelt)
    for name in spelt.values():
        name.encode()
    assert readable(["a", "é"]) == {"a": "a", "é": "é"}
    assert as_text("\udce9 \ud800") == "\\xe9 \\ud800"


# Tar files whose headers lie.


def header(name: bytes, size: int, kind: bytes) -> bytes:
    """A tar header with any size, in base 256 if need be."""
    digits = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + size.to_bytes(11, "big", signed=True)
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + digits + b"00000000000\0" + b" " * 8)
    block += kind + bytes(100) + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


LYING: dict[str, bytes] = {
    "a long name": header(b"././@LongLink", 10**12, b"L") + bytes(2048),
    "a long pax header": header(b"pax", 10**12, b"x") + bytes(2048),
    "a long global header": header(b"pax", 8**10, b"g") + bytes(2048),
    "a size below 0": header(b"a.jpg", -1, b"0") + bytes(2048),
    "a size of 2^70": header(b"a.jpg", 2**70, b"0") + bytes(2048),
    "a pax size": header(b"pax", 28, b"x") + b"28 size=99999999999999999999\n".ljust(512, b"\0")
    + header(b"a.jpg", 3, b"0") + b"abc".ljust(2048, b"\0"),
    "many pax headers": (header(b"pax", 12, b"x") + b"12 path=abc\n".ljust(512, b"\0")) * 5000 + bytes(1024),
    "many long names": (header(b"././@LongLink", 4, b"L") + b"abc\0".ljust(512, b"\0")) * 5000 + bytes(1024),
}  # fmt: skip


@pytest.mark.parametrize("how", LYING)
def test_tar_headers_that_lie_are_one_sentence(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(LYING[how])
        file.truncate(10**11)  # zeros, for whoever believes the header
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"is truncated or damaged|has no images|not an uncompressed tar|cannot read"):
        open_source(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert tar.MAX_READ_BYTES < 10**7


def test_a_large_member_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(header(b"a.jpg", 10**10, b"0"))
        file.truncate(10**10 + 512 * 4)
    source = open_source(path)
    with pytest.raises(ImageTooLargeError, match="more than 20,000,000 bytes"):
        source.read(0)


# Parquet.


def write(path: Path, image: Any, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": image} | columns), path)
    return path


def patched(path: Path, old: int, new: int) -> Path:
    """The file with a number of rows in its footer replaced: Thrift's varints in zigzag."""
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    changed = footer.replace(varint(old), varint(new))
    assert changed != footer
    path.write_bytes(data[: -8 - length] + changed + struct.pack("<I", len(changed)) + b"PAR1")
    return path


def varint(number: int) -> bytes:
    number, found = number << 1, bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes(found) + bytes([number])


@pytest.mark.parametrize("rows", [10**6, 10**9, 2**60])
def test_rows_that_a_file_cannot_hold(tmp_path: Path, rows: int) -> None:
    path = patched(write(tmp_path / "x.parquet", [HAT[:20]] * 7001), 7001, rows)
    with pytest.raises(DataError, match=r"says that it has .* rows, more than|cannot read") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_fewer_rows_than_the_footer_says(tmp_path: Path) -> None:
    path = patched(write(tmp_path / "x.parquet", [os.urandom(300) for _ in range(7001)]), 7001, 7011)
    source = open_source(path)
    assert len(source.read(7000)) == 300
    with pytest.raises(ImageError):
        source.read(7010)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pa.array([[b"a"], [b"b"]]), "has no column that is clearly the images"),
        (pa.array([{"bytes": [b"a"]}]), "has no column that is clearly the images"),
        (pa.array([{"bytes": {"bytes": "a"}}]), "has no column that is clearly the images"),
        (pa.array([{"path": "a"}]), "has no column that is clearly the images"),
        (pa.array([{}]), "has no column that is clearly the images|cannot read"),
        (pa.array([b"ab"], pa.binary(2)), "has no column that is clearly the images"),
    ],
)
def test_columns_of_other_kinds(tmp_path: Path, image: Any, message: str) -> None:
    try:
        path = write(tmp_path / "x.parquet", image)
    except pa.ArrowNotImplementedError:
        pytest.skip("cannot be written")
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_nested_bytes_are_refused_when_they_are_read(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.parquet", pa.array([{"bytes": {"bytes": b"a"}}])))
    with pytest.raises(ImageError, match=r"^cannot read .*x\.parquet: "):
        source.read(0)


def test_many_columns_make_no_long_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"column {number} " + "x" * 100: [1] for number in range(5000)}), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "x.parquet")
    assert len(str(caught.value)) < 2000


def test_one_image_in_all_rows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of one image of 100 kB stands for two thousand."""
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 20_000_000)
    path = write(tmp_path / "x.parquet", [os.urandom(100_000)] * 2000)
    assert path.stat().st_size < 200_000
    source = open_source(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in (0, 1999):
        with pytest.raises(ImageError, match=r"row group 0 of .* has images of more than 20,000,000 bytes"):
            source.read(index)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_huge_image_is_the_error_of_its_row(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.parquet", [HAT, bytes(MAX_IMAGE_BYTES * 5), HAT]))
    assert source.read(0) == source.read(2) == HAT
    with pytest.raises(ImageTooLargeError, match=r"x\.parquet/00000001: the image has more than 20,000,000 bytes"):
        source.read(1)


HUGE_ROW = """
import resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from mixmim_serve.errors import ImageError
from mixmim_serve.sources import open_source
size = 2**31 - 2**10
buffers = [None, pa.py_buffer(np.array([0, size], np.int64)), pa.py_buffer(np.zeros(size, np.uint8))]
image = pa.Array.from_buffers(pa.large_binary(), 1, buffers)
pq.write_table(pa.table({"image": image}), sys.argv[1], compression="zstd", use_dictionary=False)
try:
    open_source(sys.argv[1]).read(0)
except ImageError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif("MIXMIM_STORM" not in os.environ, reason="takes gigabytes: MIXMIM_STORM=1 make test-slow")
def test_a_row_of_two_gigabytes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HUGE_ROW, tmp_path / "x.parquet"], capture_output=True, text=True)
    assert "has images of more than 2,000,000,000 bytes" in done.stdout, done.stderr


def test_labels_of_any_length_are_bounded(tmp_path: Path) -> None:
    """A dictionary of one label of 10 MB stands for a hundred thousand."""
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 10_000_000]))
    images = pa.array([HAT[:20] + bytes([n % 256, n // 256 % 256, n // 65536]) for n in range(100_000)])
    path = write(tmp_path / "x.parquet", images, label=labels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_source(path).labels is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "x.parquet", [os.urandom(100) for _ in range(50)], label=["cat", "dog"] * 25)
    chance = random.Random(seed)  # noqa: S311
    data = bytearray(path.read_bytes())
    for _ in range(20):
        data[chance.randrange(4, len(data) - 8)] = chance.randrange(256)
    path.write_bytes(data)
    source = opened(path)
    for index in range(len(source.keys) if source else 0):
        with one_sentence(ImageError):
            source.read(index)


def opened(place: str | Path) -> Any:
    """The source, or None if it is refused in one sentence."""
    with one_sentence(DataError):
        return open_source(place)
    return None


@contextlib.contextmanager
def one_sentence(kind: type[Exception]) -> Iterator[None]:
    """What is refused inside is refused in one sentence."""
    try:
        yield
    except kind as error:
        message = str(error)
        if "\n" in message or not message.endswith("."):
            pytest.fail(message)


# Storages whose sizes lie.


class Lying(MemoryFileSystem):
    """The file system in memory, which says a wrong size and sends more than was asked for."""

    protocol = "lying"
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    says: Any = 0
    generous = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("lying:/")))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        about: dict[str, Any] = super().info(path, **kwargs)
        return about | {"size": self.says} if about["type"] == "file" else about

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path)
        return data if self.generous else data[start:end]


@pytest.fixture
def lying() -> Iterator[type[Lying]]:
    fsspec.register_implementation("lying", Lying, clobber=True)
    Lying.store.clear()
    Lying.says, Lying.generous = 0, False
    yield Lying
    Lying.store.clear()


@pytest.mark.parametrize("says", [0, 1, 10**15, -5, None, "many", 2.5])
@pytest.mark.parametrize("generous", [False, True])
def test_sizes_are_not_believed(lying: type[Lying], tmp_path: Path, says: Any, generous: bool) -> None:
    lying.says, lying.generous = says, generous
    files = fsspec.filesystem("lying")
    files.pipe("/a/hat.jpg", HAT)
    files.pipe("/a/large.jpg", bytes(MAX_IMAGE_BYTES + 5))
    files.pipe("/x.tar", write_tar(tmp_path / "x.tar", {b"hat.jpg": HAT, b"other.jpg": b"x"}).read_bytes())
    files.pipe("/x.parquet", write(tmp_path / "x.parquet", [HAT, b"x"]).read_bytes())
    folder = open_source("lying://a")
    assert folder.read(0) == HAT
    with pytest.raises(ImageTooLargeError):
        folder.read(1)
    for place in ("lying://x.tar", "lying://x.parquet"):
        source = opened(place)
        for index, data in enumerate((HAT, b"x")):
            with one_sentence(ImageError):
                assert source is None or source.read(index) == data


def test_a_list_without_end_is_refused(lying: type[Lying], monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmim_serve.sources import files

    monkeypatch.setattr(files, "MAX_LIST_BYTES", 1000)
    fsspec.filesystem("lying").pipe("/x.txt", b"a.jpg\n" * 1000)
    with pytest.raises(DataError, match="has more than 1,000 bytes"):
        open_source("lying://x.txt")


# Patterns mean what they meant.


@pytest.mark.parametrize("seed", range(6))
def test_patterns_mean_what_glob_means(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)  # noqa: S311
    tmp_path /= "far/below/all/links"
    tmp_path.mkdir(parents=True)
    names = ["a", "b", "ab", ".h", "a.jpg", "b.jpg", "[x]", "a b"]
    for _ in range(25):
        path = tmp_path.joinpath(*chance.choices(names, k=chance.randint(1, 4)))
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.chdir(tmp_path)
    parts = ["*", "**", "a", "b", "?", "a*", "*.jpg", ".*", "[ab]", "[!a]", "..", ".", "", "[[]x]", "missing"]
    for _ in range(400):
        pattern = "/".join(chance.choices(parts, k=chance.randint(1, 4)))
        for spelt in (pattern.lstrip("/"), f"{tmp_path}/{pattern}", f"./{pattern}"):
            if glob.has_magic(spelt):
                expected, found = set(glob.glob(spelt, recursive=True)), set(our_glob(spelt, SearchLimit()))
                if spelt.rstrip("/").endswith("**"):  # where glob also gives the folder itself
                    expected, found = set(filter(os.path.isfile, expected)), set(filter(os.path.isfile, found))
                assert set(map(os.path.normpath, found)) == set(map(os.path.normpath, expected)), spelt


def test_concrete_names_are_not_searched(tmp_path: Path) -> None:
    (tmp_path / "photos [2020]").mkdir()
    (tmp_path / "photos [2020]" / "a.jpg").touch()
    assert storage.expand(f"{tmp_path}/photos [2020]/a.jpg") == [f"{tmp_path}/photos [2020]/a.jpg"]
