"""Sources of images: every kind gives the same bytes and labels, and says in one sentence what is wrong with it."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from mixmim_serve.errors import DataError, ImageError, ImageTooLargeError, UndecodableImageError
from mixmim_serve.preprocess import MAX_IMAGE_BYTES, decode
from mixmim_serve.sources import Source, fingerprint, open_source, parquet, storage
from mixmim_serve.sources.files import FileSource
from mixmim_serve.sources.names import list_images

PHOTOS = {path.stem: path.read_bytes() for path in sorted((REPOSITORY / "examples").glob("*.jpg"))}
CLASSES = {name: "shoes" if "shoes" in name else "clothes" for name in PHOTOS}


def write_folder(root: Path) -> Path:
    for name, data in PHOTOS.items():
        path = root / CLASSES[name] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(root: Path) -> Path:
    for shard in range(3):
        members = {}
        for name in list(PHOTOS)[shard * 4 : shard * 4 + 4]:
            members |= {f"{name}.jpg": PHOTOS[name], f"{name}.cls": CLASSES[name].encode()}
        write_tar(root / f"train-{shard:03}.tar", members)
    return root


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=5)
    return path


def write_list(path: Path, folder: Path) -> Path:
    lines = [f"{folder / CLASSES[name] / name}.jpg\t{CLASSES[name]}" for name in PHOTOS]
    path.write_text("\n".join(lines))
    return path


def hugging_face(names: list[str]) -> dict[str, str]:
    """The metadata that `datasets` writes."""
    label = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


KINDS: dict[str, Callable[[Path], str | Path]] = {
    "folder": lambda root: write_folder(root / "photos"),
    "file url": lambda root: f"file://{write_folder(root / 'photos')}",
    "tar folder": lambda root: write_shards(root / "shards"),
    "tar glob": lambda root: write_shards(root) / "train-*.tar",
    "tar braces": lambda root: write_shards(root) / "train-{000..002}.tar",
    "parquet": lambda root: write_parquet(
        root / "train.parquet",
        {"image": [{"bytes": data, "path": None} for data in PHOTOS.values()], "label": list(CLASSES.values())},
    ),
    "list": lambda root: write_list(root / "list.txt", write_folder(root / "photos")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images_and_labels(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    source = open_source(spec)
    assert source.name == str(spec)
    assert len(set(source.keys)) == len(PHOTOS) == 12
    assert [index for run in source.runs for index in run] == list(range(12))
    assert all(len(run) for run in source.runs)
    assert source.labels is not None
    assert {(source.read(index), label) for index, label in enumerate(source.labels)} == {
        (PHOTOS[name], label) for name, label in CLASSES.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_sources_can_be_pickled_and_opened_again(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    source = open_source(spec)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    again = open_source(spec)
    assert list(source.keys) == list(copy.keys) == list(again.keys)
    assert copy.labels == again.labels == source.labels
    assert copy.runs == source.runs
    assert copy.read(11) == source.read(11)
    assert fingerprint(copy) == fingerprint(again)


@pytest.mark.parametrize("kind", ["folder", "tar glob", "parquet"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_sources_are_read_in_other_processes(kind: str, start: str, tmp_path: Path) -> None:
    source = open_source(KINDS[kind](tmp_path))
    expected = [source.read(index) for index in range(12)]
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.map(source.read, range(12)) == expected


def test_sources_are_read_from_many_threads(tmp_path: Path) -> None:
    for kind in ("tar glob", "parquet"):
        source = open_source(KINDS[kind](tmp_path / kind))
        expected = [source.read(index) for index in range(12)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(source.read, list(range(12)) * 20)) == expected * 20


def test_the_fingerprint_follows_the_keys(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    seen = {fingerprint(open_source(root))}
    (root / "shoes" / "new.jpg").write_bytes(b"")
    seen.add(fingerprint(open_source(root)))
    (root / "shoes" / "new.jpg").rename(root / "shoes" / "renamed.jpg")
    seen.add(fingerprint(open_source(root)))
    (root / "shoes" / "renamed.jpg").write_bytes(b"other content, same key")
    seen.add(fingerprint(open_source(root)))
    assert len(seen) == 3
    one, two = (FileSource("", "", keys, None) for keys in (("ab", "c"), ("a", "bc")))
    assert fingerprint(one) != fingerprint(two)


# Folders


def test_a_folder_is_listed_as_list_images_does(tmp_path: Path) -> None:
    names = ["a-b/1.jpg", "a/1.JPEG", "a/deep/2.png", "a/notes.txt", "a/.hidden.jpg", ".cache/3.jpg", "b/.h/4.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = open_source(tmp_path)
    assert source.keys == ("a/1.JPEG", "a/deep/2.png", "a-b/1.jpg")
    assert [tmp_path / key for key in source.keys] == list_images(tmp_path)
    assert source.labels == ("a", "a", "a-b")
    assert source.runs == (range(3),)


def test_one_image_in_the_root_takes_all_labels(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "loose.jpg").touch()
    assert open_source(root).labels is None


@pytest.mark.parametrize("where", ["", "{folder}/", "file://{folder}/"])
def test_a_pattern_of_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    for name in ("cat/1.jpg", "dog/a/2.jpg", "dog/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "07.jpg", tmp_path / name)
    (tmp_path / "dog" / "notes.md").write_text("no image")
    monkeypatch.chdir(tmp_path)
    place = where.format(folder=tmp_path)
    found = open_source(f"{place}**/*")
    assert found.keys == ("cat/1.jpg", "dog/3.jpg", "dog/a/2.jpg")
    assert found.labels == ("cat", "dog", "dog")
    assert found.read(2) == (photos / "07.jpg").read_bytes()
    below = open_source(f"{place}dog/*.jpg")
    assert (below.keys, below.labels) == (("3.jpg",), None)
    below.check(0)
    assert {Path(each).resolve() for each in found.places} == {(tmp_path / key).resolve() for key in found.keys}
    assert open_source(f"{place}{{cat,dog}}/*.jpg").keys == ("cat/1.jpg", "dog/3.jpg")


def test_a_folder_whose_name_looks_like_a_pattern_or_shard(tmp_path: Path) -> None:
    for name in ("photos [2020]", "x{1,2}", "old.tar"):
        assert len(open_source(write_folder(tmp_path / name)).keys) == 12


def test_hidden_files_are_no_shards(tmp_path: Path, memory: Any) -> None:
    touch(write_shards(tmp_path), ".part.tar", ".cache/x.tar")
    memory.put(f"{tmp_path}/", "/data", recursive=True)
    for spec in (tmp_path, "memory://data"):
        assert len(open_source(spec).runs) == 3


# Tar shards


def test_tar_members_are_grouped_by_their_name_up_to_the_first_dot(tmp_path: Path) -> None:
    hat, shirt = PHOTOS["hat"], PHOTOS["shirt"]
    path = write_tar(
        tmp_path / "one.tar",
        {
            "./b/7.seg.png": shirt,
            "b/7.json": b'{"caption": "x", "label": 5}',
            "b/7.jpg": hat,
            "a/7.jpg": shirt,
            "a/7.json": b'{"class": "dog"}',
            "a/7.cls": b"cat\n",
            "._a.jpg": b"AppleDouble",
            "readme.txt": b"",
        },
    )
    source = open_source(path)
    assert source.keys == ("one.tar/a/7.jpg", "one.tar/b/7.jpg", "one.tar/b/7.seg.png")
    assert source.labels == ("cat", "5", "5")
    assert [source.read(index) for index in range(3)] == [shirt, hat, shirt]


@pytest.mark.parametrize("label", [b"", b"\xff", b"[1]", b'{"label": null}', b'{"label": [1]}', b"{"])
def test_a_label_that_is_none_takes_all_labels(tmp_path: Path, label: bytes) -> None:
    members = {"1.jpg": b"x", "1.json": b'{"label": 1}', "2.jpg": b"y", "2.json": label}
    assert open_source(write_tar(tmp_path / "one.tar", members)).labels is None


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"old", b"new"):
            member = tarfile.TarInfo("1.jpg")
            member.size = 3
            tar.addfile(member, io.BytesIO(data))
    source = open_source(path)
    assert [source.read(index) for index in range(len(source.keys))] == [b"new"]


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "x.tar", {"1.jpg": folder.encode()})
    write_tar(tmp_path / "b" / "empty.tar", {"1.txt": b""})
    source = open_source(tmp_path / "*" / "*.tar")
    assert source.keys == ("a/x.tar/1.jpg", "b/x.tar/1.jpg")
    assert source.runs == (range(1), range(1, 2))
    assert [source.read(index) for index in range(2)] == [b"a", b"b"]


def test_every_truncation_of_a_tar_is_found(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.jpg": bytes(700) for n in range(3)}).read_bytes()
    end = 3 * (512 + 1024)
    cut = tmp_path / "cut.tar"
    for size in [*range(512, end, 512), *range(700, end, 512), end, end + 100]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tar is truncated or damaged: copy or write it again"):
            open_source(cut)
    cut.write_bytes(whole[: end + 512])
    assert len(open_source(cut).keys) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "one.tar", {f"{n}.jpg": bytes(512) for n in range(3)})
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 1  # the checksum of the second header
    path.write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        open_source(path)


def test_a_shard_that_changes_after_opening_is_an_image_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "one.tar", {"1.jpg": PHOTOS["hat"]})
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UndecodableImageError, match=r"one\.tar is shorter than when it was opened"):
        source.read(0)
    path.unlink()
    with pytest.raises(ImageError, match=r"cannot read .*one\.tar: no such file\.$"):
        source.read(0)


# Parquet


@pytest.mark.parametrize(
    ("values", "metadata", "labels"),
    [
        ([1, 0], hugging_face(["cat", "dog"]), ("dog", "cat")),
        ([1, -1], hugging_face(["cat", "dog"]), None),
        ([1, 2], hugging_face(["cat", "dog"]), None),
        ([1, 10], {"huggingface": "{"}, ("1", "10")),
        ([1, 10], {"huggingface": '{"info": null}'}, ("1", "10")),
        (["cat", None], None, None),
        ([0.5, 1.5], None, None),
        (pa.array(["b", "a"]).dictionary_encode(), None, ("b", "a")),
    ],
)
def test_labels_of_parquet(values: Any, metadata: Any, labels: Any, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": [b"x", b"y"], "label": values}, metadata)
    assert open_source(path).labels == labels


def test_class_labels_are_found_by_their_type(tmp_path: Path) -> None:
    metadata = {"huggingface": hugging_face(["cat", "dog"])["huggingface"].replace('"label"', '"animal"')}
    path = write_parquet(tmp_path / "x.parquet", {"image": [b"x", b"y"], "animal": [1, 0]}, metadata)
    assert open_source(path).labels == ("dog", "cat")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"thumbnail": [b"t"], "image": [b"i"]}, b"i"),
        ({"scan": [b"s"], "text": ["t"]}, b"s"),
        ({"image": ["a path"], "scan": [{"bytes": b"s"}]}, b"s"),
        ({"image": pa.array([b"i"], pa.large_binary())}, b"i"),
        ({"image": pa.array([b"i"], pa.binary_view())}, b"i"),
        ({"im.age": [b"i"]}, b"i"),
    ],
)
def test_the_column_of_images(columns: dict[str, Any], found: bytes, tmp_path: Path) -> None:
    assert open_source(write_parquet(tmp_path / "x.parquet", columns)).read(0) == found


def test_rows_without_an_image_or_with_too_large_a_one(tmp_path: Path) -> None:
    rows = [{"bytes": b"x", "path": "a"}, None, {"bytes": None, "path": "b"}, {"bytes": bytes(MAX_IMAGE_BYTES + 1)}]
    source = open_source(write_parquet(tmp_path / "x.parquet", {"image": rows}))
    assert source.read(0) == b"x"
    for index in (1, 2):
        with pytest.raises(UndecodableImageError, match=rf"x\.parquet/0000000{index} holds no bytes: store the image"):
            source.read(index)
    with pytest.raises(ImageTooLargeError, match=r"x\.parquet/00000003: the image has more than 20,000,000 bytes"):
        source.read(3)


def test_a_damaged_row_group_is_an_image_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": [os.urandom(1000) for _ in range(10)]})
    source = open_source(path)
    data = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
    assert len(source.read(4)) == 1000
    with pytest.raises(ImageError, match=r"cannot read .*x\.parquet: "):
        source.read(5)


def test_row_groups_stay_in_memory_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": [bytes([n]) * 1000 for n in range(20)]})
    source = open_source(path)
    assert [len(run) for run in source.runs] == [5, 5, 5, 5]
    groups = parquet._RowGroups()
    monkeypatch.setattr(parquet, "_row_groups", groups)
    monkeypatch.setattr(parquet, "CACHED_BYTES", 12_000)
    for index in (0, 5, 0, 10, 15, 1, 19):
        assert source.read(index) == bytes([index]) * 1000
    assert [number for _, number, _ in groups.columns] == [2, 0, 3][-len(groups.columns) :]


# Lists


LISTS = {
    "plain.txt": ("# photos\nb.jpg\n\n a.jpg \r\n", None),
    "commas.txt": ("a.jpg,cat\nb.jpg,dog\n", ("cat", "dog")),
    "tabs.txt": ("a.jpg\tcat\nb.jpg\tdog", ("cat", "dog")),
    "bare.csv": ("a.jpg,cat\nb.jpg,dog\n", ("cat", "dog")),
    "header.csv": ("\ufeffpath,id,Label\na.jpg,1,cat\nb.jpg,2,dog\n", ("cat", "dog")),
    "turned.tsv": ("id\tclass\tpath\n\tcat\ta.jpg\n2\tdog\tb.jpg\n3\tdog\t\n4\n", ("cat", "dog")),
    "class of a header's name.csv": ("a.jpg,file\nb.jpg,image\n", ("file", "image")),
    "quoted.csv": ('path,label\n"a.jpg","cat, small"\nb.jpg,dog\n', ("cat, small", "dog")),
    "unlabelled.csv": ("path,width\na.jpg,5\nb.jpg,6\n", None),
    "partly.tsv": ("a.jpg\tcat\nb.jpg\n", None),
    "empty.tsv": ("path\tlabel\na.jpg\t\nb.jpg\tdog\n", None),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, labels = LISTS[name]
    (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "a.jpg").write_bytes(b"A")
    for spec in (tmp_path / name, name):  # also with nothing before the list's name
        monkeypatch.chdir(tmp_path)
        source = open_source(spec)
        assert source.keys == ("a.jpg", "b.jpg")
        assert source.labels == labels
        assert source.read(0) == b"A"
        with pytest.raises(ImageError, match=r"cannot read .*b\.jpg: no such file or directory"):
            source.read(1)


def test_a_comma_may_belong_to_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one, two.jpg\none, three.jpg,cat\n")
    assert open_source(tmp_path / "x.txt").keys == ("one, three.jpg", "one, two.jpg")


def test_a_list_may_name_whole_paths_and_urls(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/far/b.jpg", b"B")
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "x.txt").write_text(f"{tmp_path / 'a.jpg'}\nmemory://far/b.jpg\nmemory://far/c.jpg\nodd://x/d.jpg")
    source = open_source(tmp_path / "x.txt")
    assert [source.read(index) for index in range(2)] == [b"A", b"B"]
    with pytest.raises(ImageError, match=r"^cannot read memory://far/c\.jpg: no such file\.$"):
        source.read(2)
    with pytest.raises(ImageError, match=r"^cannot read odd://x/d\.jpg: Protocol not known: odd\.$"):
        source.read(3)


# URLs


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system in memory, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


REMOTE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (write_folder, "memory://data"),
    "folder with a slash": (write_folder, "memory://data/"),
    "root": (write_folder, "memory://"),
    "shards": (write_shards, "memory://data"),
    "glob": (write_shards, "memory://data/*.tar"),
    "braces": (write_shards, "memory://data/train-{000..002}.tar"),
    "parquet": (
        lambda root: write_parquet(root / "x.parquet", {"img": list(PHOTOS.values()), "label": [*CLASSES.values()]}),
        "memory://data/x.parquet",
    ),
    "list": (
        lambda root: (write_folder(root) / "x.csv").write_text(
            "".join(f"{CLASSES[name]}/{name}.jpg,{CLASSES[name]}\n" for name in PHOTOS)
        ),
        "memory://data/x.csv",
    ),
}


@pytest.mark.parametrize("kind", REMOTE)
def test_urls_give_what_local_paths_give(kind: str, tmp_path: Path, memory: Any) -> None:
    write, url = REMOTE[kind]
    write(tmp_path)
    memory.put(f"{tmp_path}/", "/" if url == "memory://" else "/data", recursive=True)
    remote = open_source(url)
    local = open_source(re.sub("^memory://(data/?)?", f"{tmp_path}/", url))
    assert (remote.keys, remote.labels, remote.runs) == (local.keys, local.labels, local.runs)
    assert len(remote.keys) == 12
    for index in range(12):
        assert remote.read(index) == local.read(index)


def test_a_large_image_behind_a_url_is_refused(memory: Any) -> None:
    memory.pipe("/data/big.jpg", bytes(MAX_IMAGE_BYTES + 2))
    with pytest.raises(ImageTooLargeError, match=r"memory://data/big\.jpg: the image has more than 20,000,000 bytes"):
        open_source("memory://data").read(0)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `Ranges` also answers requests for parts, as most servers do."""

    ranges = False

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        path = Path(self.translate_path(self.path))
        if match is None or not path.is_file():
            super().do_GET()
            return
        part = path.read_bytes()[int(match[1]) : int(match[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        super().end_headers()


class Ranges(Handler):
    ranges = True


@contextlib.contextmanager
def served(folder: Path, handler: type[Handler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("handler", [Handler, Ranges])
def test_images_of_a_web_server(handler: type[Handler], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos")
    (tmp_path / "photos" / "shoes" / "big.jpg").write_bytes(bytes(MAX_IMAGE_BYTES + 2))
    with served(tmp_path, handler) as url:
        (tmp_path / "list.txt").write_text(f"photos/shoes/shoes.jpg\nphotos/none.jpg\n{url}/photos/shoes/big.jpg?a=1")
        source = open_source(f"{url}/list.txt?signature=1")
        by_key = {key: index for index, key in enumerate(source.keys)}
        assert source.read(by_key["photos/shoes/shoes.jpg"]) == PHOTOS["shoes"]
        with pytest.raises(ImageError, match=r"^cannot read http.*none\.jpg: 404"):
            source.read(by_key["photos/none.jpg"])
        with pytest.raises(ImageTooLargeError, match="more than 20,000,000 bytes"):
            source.read(by_key[f"{url}/photos/shoes/big.jpg?a=1"])
        folder = open_source(f"{url}/photos/")  # by the server's own listing
        assert folder.labels is not None
        assert set(folder.labels) == {"clothes", "shoes"}


def test_shards_of_a_web_server_need_ranges(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with served(tmp_path, Ranges) as url:
        source = open_source(f"{url}/train-{{000..002}}.tar?signature=1")
        assert source.keys == open_source(tmp_path).keys
        assert [source.read(index) for index in range(12)] == list(PHOTOS.values())
    with pytest.raises(ImageError, match=r"^cannot read http://127.*train-000\.tar\?signature=1: "):
        source.read(0)  # the server is gone
    with (
        served(tmp_path, Handler) as url,
        pytest.raises(
            DataError, match=r"train-000\.tar cannot be read in parts, its server ignores range requests: down"
        ),
    ):
        open_source(f"{url}/train-000.tar")


# What is wrong, in one sentence


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def mixed_columns(root: Path) -> Path:
    for name in ("image", "img"):
        write_parquet(root / f"{name}.parquet", {name: [b"x"]})
    return root


WRONG: dict[str, Callable[[Path], str | Path]] = {
    r"gone: no such file or folder\.$": lambda root: root / "gone",
    r"gone\.tar: no such file or folder\.$": lambda root: root / "gone.tar",
    r"has no images and no \.tar or \.parquet files: expected a folder of images, \.tar": lambda root: touch(
        root, "a.txt", ".b.jpg"
    ),
    r"^cannot read memory://gone: no such file|^memory://gone has no images": lambda root: "memory://gone",
    r"^cannot read memory://gone\.tar: no such file\.$": lambda root: "memory://gone.tar",
    r"^cannot read odd://x: Protocol not known: odd\.$": lambda root: "odd://x",
    r"x\.zip is not a source of images: expected a folder of images": lambda root: touch(root, "x.zip") / "x.zip",
    r"no file matches .*\*\.tar: check the pattern, and quote it": lambda root: root / "*.tar",
    r"^no file matches memory://none/\*\.tar": lambda root: "memory://none/*.tar",
    r"^cannot read .*x-1\.tar: no such file": lambda root: root / "x-{1..2}.tar",
    r"mixes \.parquet and \.tar files: choose one kind, such as 'folder/\*\.parquet'": lambda root: touch(
        root, "a.tar", "b.parquet"
    ),
    r"a\.tgz is compressed, so single images cannot be read from it: decompress it to a \.tar": lambda root: touch(
        root, "a.tgz"
    ),
    r"a\.tar\.GZ is compressed": lambda root: touch(root, "a.tar.GZ") / "a.tar.GZ",
    r"a\.tar is not an uncompressed tar archive: decompress it": lambda root: text(
        root / "a.tar", b"\x1f\x8b" + bytes(range(256)) * 9
    ),
    r"e\.tar is not an uncompressed tar archive": lambda root: touch(root, "e.tar"),
    r"a\.tar has no images: expected members such as 0001\.jpg next to": lambda root: write_tar(
        root / "a.tar", {"1.txt": b""}
    ),
    r"^cannot read .*x\.parquet: .*": lambda root: text(root / "x.parquet", b"PAR1 is not enough"),
    r"no column that is clearly the images: expected a column `image`.*; its columns are url, a, b\.$": lambda root: (
        write_parquet(root / "x.parquet", {"url": ["u"], "a": [b"a"], "b": [b"b"]})
    ),
    "has its images in columns of different names": mixed_columns,
    r"x\.parquet has no rows: expected one image per row": lambda root: write_parquet(
        root / "x.parquet", {"image": pa.array([], pa.binary())}
    ),
    r"x\.txt lists no images: expected a path per line": lambda root: text(root / "x.txt", b"# nothing\n\n"),
    r"x\.csv lists no images": lambda root: text(root / "x.csv", b"path,label\n"),
    r"x\.csv lists a\.jpg twice: list each image once": lambda root: text(root / "x.csv", b"a.jpg,1\na.jpg,2\n"),
    r"^cannot read .*x\.txt: 'utf-8' codec": lambda root: text(root / "x.txt", b"caf\xe9.jpg\n"),
    r"^cannot read .*x\.csv: field larger than field limit": lambda root: text(root / "x.csv", b'"' + bytes(10**6)),
    r"\*\.txt matches 2 lists: combine them into one": lambda root: touch(root, "a.txt", "b.txt") / "*.txt",
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_is_wrong_is_one_sentence(sentence: str, tmp_path: Path, memory: Any) -> None:
    with pytest.raises(DataError) as caught:
        open_source(WRONG[sentence](tmp_path))
    message = str(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")


def test_a_package_for_a_url_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {"s3": "s3fs.S3FileSystem", "https": "fsspec.implementations.missing.HTTPFileSystem"}
    registry = sys.modules["fsspec.registry"]  # fsspec.registry itself is a dictionary of that name
    monkeypatch.setattr(registry, "registry", {})
    for scheme, path in known.items():
        monkeypatch.setitem(registry.known_implementations, scheme, {"class": path, "err": ""})
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"^s3://bucket/x needs a package that is not installed: run pip install s3fs"):
        open_source("s3://bucket/x")
    (tmp_path / "x.txt").write_text("https://host/a.jpg")
    source = open_source(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"^https://host/a\.jpg needs a package .*: run pip install aiohttp\.$"):
        source.read(0)  # not an ImageError: no other image could be read either


@pytest.mark.parametrize(("package", "spec"), [("fsspec", "memory://x"), ("pyarrow", "x.parquet")])
def test_an_optional_package_that_is_missing_is_named(package: str, spec: str, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    write_folder(tmp_path / "photos")
    code = f"""
import sys
from mixmim_serve.sources import open_source
assert not sys.modules.keys() & {{"fsspec", "pyarrow"}}
sys.modules[{package!r}] = None
open_source("file://{tmp_path}/photos").read(0)
try:
    open_source({spec!r})
except ModuleNotFoundError as error:
    assert error.name.partition(".")[0] == {package!r}, error.name
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}.tar", ["a-10.tar", "a-8.tar", "a-9.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,a}.tar", ["a.tar"]),
        ("https://host/{0..1}.tar?x={1,2}", ["https://host/0.tar?x=1", "https://host/0.tar?x=2"]),
    ],
)
def test_braces(pattern: str, meant: list[str]) -> None:
    assert storage.expand(pattern)[: len(meant)] == meant


def test_a_source_holds_only_images_that_decode_the_same(tmp_path: Path) -> None:
    sources: list[Source] = [open_source(KINDS[kind](tmp_path / kind)) for kind in ("tar glob", "parquet")]
    for one, two in itertools.pairwise(sources):
        for index in range(12):
            assert decode(one.read(index)).tobytes() == decode(two.read(index)).tobytes()
