"""Many images to features: files in order through the engine, shards, columns, formats."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from extracting import features, files_of, small
from PIL import Image
from serving import HAT, PHOTOS, Around, client_of
from serving import files as form

from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.errors import ConfigError, DataError, ImageError, OutputError, UndecodableImageError
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.lead import run
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.extract.pipeline import AHEAD, decode_small, map_ahead, run_files
from mixmim_serve.extract.plan import images_per_shard, plan
from mixmim_serve.preprocess import preprocess
from mixmim_serve.sources import open_source


@pytest.fixture(scope="module")
def engine(exported_bundle: Path) -> Engine:
    return open_engine(exported_bundle, "onnx", threads=1)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "cut.jpg"
    path.write_bytes(HAT[:1000])
    return path


# A few files, in order


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_each_file_gets_its_own_outputs_in_order(engine: Engine, broken: Path, batch: int) -> None:
    photos = list(PHOTOS.values())
    paths = [*photos[:3], broken, *photos[3:], broken]
    results = list(run_files(engine, paths, ["embedding", "stage4"], batch))
    assert [result.path for result in results] == paths
    for result in results:
        if result.path == broken:
            assert isinstance(result.error, UndecodableImageError)
            assert result.outputs == {}
            continue
        pixels = preprocess(result.path.read_bytes(), engine.bundle.description.preprocessing)
        alone = engine.run("encoder", {"pixels": pixels[None]}, ["embedding", "stage4"])
        assert result.error is None
        for name, array in alone.items():
            np.testing.assert_allclose(result.outputs[name], array[0], atol=1e-5)


def test_files_that_cannot_be_read_are_results_with_errors(engine: Engine, broken: Path, tmp_path: Path) -> None:
    around = Around(engine, lambda: pytest.fail("nothing to run"))
    results = list(run_files(around, [broken, tmp_path, tmp_path / "missing.jpg"], ["embedding"]))
    assert all(isinstance(result.error, ImageError) for result in results)
    assert list(run_files(around, [], ["embedding"])) == []


def test_decoding_stays_a_bounded_way_ahead(engine: Engine) -> None:
    taken: list[Path] = []

    class Watched(list[Path]):
        def __iter__(self) -> Iterator[Path]:
            for path in super().__iter__():
                taken.append(path)
                yield path

    results = run_files(engine, Watched([PHOTOS["hat"]] * 100), ["embedding"], batch=2)
    next(results)
    assert len(taken) <= 2 * (AHEAD + 4)
    results.close()


def test_map_ahead_begins_at_once_and_stops_when_it_is_left() -> None:
    begun: list[int] = []

    def note(item: int) -> int:
        begun.append(item)
        return item

    with ThreadPoolExecutor(1) as pool:
        answers = map_ahead(pool, note, iter(range(100)), 3)
    assert begun == [0, 1, 2]  # nobody has asked yet
    with ThreadPoolExecutor(1) as pool:
        assert list(map_ahead(pool, note, iter(range(100)), 3)) == list(range(100))
    answers.close()


# The plan


@dataclasses.dataclass
class Cut:
    """A source of which only the cuts matter."""

    runs: Sequence[range]


@pytest.mark.parametrize(
    ("runs", "images", "expected"),
    [
        ([10], 4, [3, 3, 4]),
        ([10], 100, [10]),
        ([3, 3, 3, 3], 7, [6, 6]),  # runs are joined whole
        ([3, 10, 3], 4, [3, 3, 3, 4, 3]),  # and cut evenly
        ([4, 4], 4, [4, 4]),
        ([1] * 9, 4, [4, 4, 1]),
    ],
)
def test_shards_respect_where_the_source_is_cut(runs: list[int], images: int, expected: list[int]) -> None:
    ends = np.cumsum([0, *runs]).tolist()
    shards = plan(Cut([range(*pair) for pair in itertools.pairwise(ends)]), images)
    assert [len(shard.indices) for shard in shards] == expected
    assert [index for shard in shards for index in shard.indices] == list(range(sum(runs)))
    assert [shard.name for shard in shards] == [f"{number:06d}" for number in range(len(expected))]


def test_a_billion_images_make_a_sane_number_of_files() -> None:
    assert images_per_shard(1000) == images_per_shard(100_000_000) == 4096
    assert 60_000 < 1_000_000_000 / images_per_shard(1_000_000_000) <= 65_536


# What is written


def test_every_column_says_what_it_should(engine: Engine, photos: Path, tmp_path: Path) -> None:
    (photos_copy := tmp_path / "in").mkdir()
    for path in sorted(photos.iterdir())[:3]:
        (photos_copy / path.name).write_bytes(path.read_bytes())
    turned = Image.new("RGB", (60, 40), (200, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(photos_copy / "turned.jpg", exif=exif)
    job = small(engine, photos_copy, tmp_path / "out", options=ExtractOptions(("stage4", "logits")))
    summary = features(job, engine)
    assert (summary.rows, summary.errors, summary.complete) == (4, 0, True)
    file = pq.ParquetFile(tmp_path / "out" / "features" / "000000.parquet")
    table = file.read()
    assert table.column_names == [
        "key", "embedding", "class", "probability", "stage4", "logits", "width", "height", "sha256",
    ]  # fmt: skip
    assert table["key"].to_pylist() == ["00.jpg", "01.jpg", "02.jpg", "turned.jpg"]
    assert (table["width"][3].as_py(), table["height"][3].as_py()) == (40, 60)
    preprocessing = engine.bundle.description.preprocessing
    for row, path in zip(table.to_pylist(), sorted(photos_copy.iterdir()), strict=True):
        data = path.read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        expected = engine.run(
            "encoder", {"pixels": preprocess(data, preprocessing)[None]}, ["embedding", "stage4", "logits"]
        )
        for name, array in expected.items():
            np.testing.assert_allclose(row[name], array[0].reshape(-1), atol=1e-5)
        powers = np.exp(expected["logits"][0])
        assert row["class"] == ("cat", "dog", "owl")[int(powers.argmax())]
        assert row["probability"] == pytest.approx(powers.max() / powers.sum(), abs=1e-5)
    about = json.loads(file.schema_arrow.metadata[b"mixmim"])
    assert about["fingerprint"] == engine_fingerprint(engine)
    assert about["preprocessing"]["image_size"] == 64
    assert about["shapes"] == {"embedding": [64], "stage4": [64, 2, 2], "logits": [3]}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["source"] == {"name": str(photos_copy), "images": 4, "sha256": open_source(photos_copy).digest()}
    (shard,) = manifest["shards"]
    content = (tmp_path / "out" / "features" / "000000.parquet").read_bytes()
    assert shard["files"]["features/000000.parquet"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def write_tar(path: Path, photos: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for photo in sorted(photos.iterdir()):
            tar.add(photo, photo.name)
    return path


def write_parquet(path: Path, photos: Path) -> Path:
    images = [photo.read_bytes() for photo in sorted(photos.iterdir())]
    pq.write_table(pa.table({"image": images}), path, row_group_size=7)
    return path


def write_list(path: Path, photos: Path) -> Path:
    path.write_text("\n".join(str(photo) for photo in photos.iterdir()))
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda photos, root: photos,
        lambda photos, root: f"{write_tar(root / 'a.tar', photos).parent}/*.tar",
        lambda photos, root: write_parquet(root / "a.parquet", photos),
        lambda photos, root: write_list(root / "a.csv", photos),
    ],
    ids=["folder", "glob of tar", "parquet", "list"],
)
def test_every_kind_of_source_gives_the_same_rows(
    engine: Engine, photos: Path, tmp_path: Path, make: Callable[[Path, Path], str | Path]
) -> None:
    source = make(photos, tmp_path)
    features(small(engine, source, tmp_path / "out", images=10), engine)
    reference = list(run_files(engine, sorted(photos.iterdir()), ["embedding"], batch=4))
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out" / "features").iterdir())])
    assert table["embedding"].to_pylist() == [result.outputs["embedding"].tolist() for result in reference]
    assert len(set(table["key"].to_pylist())) == 24


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_holds_what_parquet_holds(engine: Engine, photos: Path, tmp_path: Path, dtype: str) -> None:
    both = {}
    for kind in ("parquet", "npy"):
        options = ExtractOptions(("stage3",), format=kind, dtype=dtype)
        features(small(engine, photos, tmp_path / kind, images=10, options=options), engine)
        both[kind] = tmp_path / kind / "features"
    table = pq.read_table(both["parquet"] / "000001.parquet")
    assert sorted(path.name for path in both["npy"].iterdir() if "000001" in path.name) == [
        "000001.keys.parquet", "000001.npy", "000001.stage3.npy",
    ]  # fmt: skip
    for column, name in (("embedding", "000001.npy"), ("stage3", "000001.stage3.npy")):
        array = np.load(both["npy"] / name, allow_pickle=False)
        assert array.dtype == dtype
        assert np.array_equal(array, np.stack(table[column].to_numpy(zero_copy_only=False)))
    keys = pq.read_table(both["npy"] / "000001.keys.parquet")
    assert keys["key"].equals(table["key"])
    assert keys["sha256"].equals(table["sha256"])


def test_rows_do_not_depend_on_shards_threads_or_neighbours(engine: Engine, photos: Path, tmp_path: Path) -> None:
    def rows(name: str, source: Path, **options: Any) -> dict[str, list[float]]:
        features(small(engine, source, tmp_path / name, **options), engine)
        table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / name / "features").iterdir())])
        return dict(zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True))

    few = tmp_path / "few"
    few.mkdir()
    for path in list(photos.iterdir())[3:8]:
        (few / path.name).write_bytes(path.read_bytes())
    everything = rows("one", photos)
    assert rows("two", photos, images=5, threads=1) == everything
    assert all(everything[key] == row for key, row in rows("three", few).items())


class Watched(Around):
    """An engine that notes how many images each batch has."""

    def run(self, graph: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        self.ran.append((graph, [len(inputs["pixels"])]))
        return self.engine.run(graph, inputs, outputs)


def test_every_batch_has_one_size(engine: Engine, spoilt: Path, tmp_path: Path) -> None:
    watched = Watched(engine, lambda: None)
    features(small(engine, spoilt, tmp_path / "out", images=7), watched)
    assert {tuple(sizes) for _, sizes in watched.ran} == {(4,)}
    assert len(watched.ran) == 7  # four shards of six; one batch is both images that cannot be read


def test_a_url_holds_what_a_folder_holds(engine: Engine, photos: Path, tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    for path in photos.iterdir():
        filesystem.pipe(f"/bucket/photos/{path.name}", path.read_bytes())
    features(small(engine, photos, tmp_path / "out", images=10), engine)
    features(small(engine, "memory://bucket/photos", "memory://bucket/out", images=10), engine)
    local = files_of(tmp_path / "out" / "features")
    assert {name: filesystem.cat(f"/bucket/out/features/{name}") for name in local} == local
    assert not filesystem.exists("/bucket/out/.lock")
    filesystem.rm("/bucket/out/features/000001.parquet")
    features(small(engine, "memory://bucket/photos", "memory://bucket/out", images=10), engine)
    assert filesystem.cat("/bucket/out/features/000001.parquet") == local["000001.parquet"]


def test_one_vector_three_ways(engine: Engine, exported_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "hat.jpg").write_bytes(HAT)
    features(small(engine, tmp_path / "in", tmp_path / "out", options=ExtractOptions(batch=1)), engine)
    features(small(engine, tmp_path / "in", tmp_path / "out32"), engine)
    (alone,) = run_files(engine, [PHOTOS["hat"]], ["embedding"])  # what `mixmim embed` writes
    with client_of(engine) as client:
        served = client.post("/embed", files=form(HAT)).json()["embedding"]
    stored = [pq.read_table(tmp_path / out / "features" / "000000.parquet")["embedding"][0] for out in ("out", "out32")]
    np.testing.assert_array_equal(stored[0].as_py(), alone.outputs["embedding"])  # one batch bucket: to the last bit
    np.testing.assert_array_equal(np.array(served, np.float32), alone.outputs["embedding"])
    np.testing.assert_allclose(stored[1].as_py(), served, atol=1e-5)


# Reduced JPEG decoding


def noisy_photo(width: int, height: int) -> bytes:
    values = np.asarray(Image.open(io.BytesIO(HAT)).convert("RGB").resize((width, height)), np.float32)
    values = values + np.random.default_rng(0).normal(0, 8, values.shape)
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_fast_jpeg_keeps_the_size_and_nearly_the_pixels(engine: Engine) -> None:
    preprocessing = engine.bundle.description.preprocessing
    large = noisy_photo(1600, 1200)
    fast, full = decode_small(large, preprocessing, True), decode_small(large, preprocessing)
    assert (fast.width, fast.height) == (full.width, full.height) == (1600, 1200)
    difference = np.abs(fast.pixels.astype(int) - full.pixels).mean()
    assert 0 < difference < 3
    assert np.array_equal(full.pixels, preprocess(large, preprocessing))
    modest = noisy_photo(240, 180)  # at a half its shorter side would be less than twice 72 pixels
    assert np.array_equal(decode_small(modest, preprocessing, True).pixels, preprocess(modest, preprocessing))


# Refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"features": ("stage5",)}, "no features 'stage5': choose among stage1, stage2, stage3, stage4, logits"),
        ({"features": ("stage1", "stage1")}, "listed twice: list each one once"),
    ],
)
def test_features_that_the_model_lacks_are_refused(
    engine: Engine, photos: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        features(small(engine, photos, tmp_path / "out", options=ExtractOptions(**options)), engine)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("options", [{"format": "csv"}, {"dtype": "int8"}, {"batch": 0}, {"images": -1}])
def test_options_are_checked_when_built(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ExtractOptions(**options)


def test_a_folder_of_somebody_elses_features_is_left_alone(engine: Engine, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "mine.parquet").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"has features but no manifest\.json"):
        features(small(engine, photos, tmp_path), engine)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".lock", "mine.parquet"]


def test_an_empty_source_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="has no images"):
        run(ExtractJob(engine.bundle.path, str(tmp_path / "in"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_folder_reads_back_nothing_of_what_is_missing(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "none")
    assert folder.read_bytes("manifest.json") is None
    assert folder.sizes("features") == {}
