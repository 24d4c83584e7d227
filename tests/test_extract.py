"""Many image files through an engine: in order, in batches, each with its own row or its own error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from serving import HAT, PHOTOS, Around

from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.errors import ImageError, UndecodableImageError
from mixmim_serve.extract.parquet import write_parquet
from mixmim_serve.extract.run import AHEAD, Result, run_files
from mixmim_serve.preprocess import preprocess


@pytest.fixture(scope="module")
def engine(exported_bundle: Path) -> Engine:
    return open_engine(exported_bundle, "onnx", threads=1)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "cut.jpg"
    path.write_bytes(HAT[:1000])
    return path


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
    assert len(taken) <= 2 * (AHEAD + 1)
    results.close()


@pytest.mark.parametrize("rows", [2, 100])
def test_parquet_is_written_in_groups(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("mixmim_serve.extract.parquet.ROWS", rows)
    vectors = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    results = [Result(tmp_path / "in" / f"{n}.jpg", {"embedding": vector}) for n, vector in enumerate(vectors)]
    results.insert(2, Result(tmp_path / "in" / "bad.jpg", {}, ImageError("bad")))
    bundle, target = engine.bundle, tmp_path / "out.parquet"
    assert write_parquet(results, engine, tmp_path / "in", target) == 5
    file = pq.ParquetFile(target)
    assert file.num_row_groups == (3 if rows == 2 else 1)
    table = file.read()
    assert table["path"].to_pylist() == [f"{n}.jpg" for n in range(5)]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors)
    about = json.loads(file.schema_arrow.metadata[b"mixmim"])
    assert about["fingerprint"] == engine_fingerprint(engine)
    assert about["architecture"] == json.loads(json.dumps(bundle.description.to_dict()["architecture"]))


def test_a_failed_extraction_leaves_no_parquet(engine: Engine, tmp_path: Path) -> None:
    def fail() -> Iterator[Result]:
        yield Result(tmp_path / "a.jpg", {"embedding": np.zeros(64, np.float32)})
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_parquet(fail(), engine, tmp_path, tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []
