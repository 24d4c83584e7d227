"""Features as a Lance data set: the same table, through kills of any kind, and no file that nobody names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from extracting import features, small

from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError
from mixmim_serve.extract.job import ExtractJob
from mixmim_serve.extract.options import ExtractOptions

lance = pytest.importorskip("lance")


@pytest.fixture
def job(engine: Engine, spoilt: Path, tmp_path: Path) -> ExtractJob:
    return small(engine, spoilt, tmp_path / "out", images=7, options=ExtractOptions(("stage4",), "lance", "float16"))


def test_lance_holds_what_parquet_holds(job: ExtractJob, engine: Engine, spoilt: Path, tmp_path: Path) -> None:
    other = small(
        engine, spoilt, tmp_path / "parquet", images=7, options=ExtractOptions(("stage4",), "parquet", "float16")
    )
    expected = features(other, engine)
    found = features(job, engine)
    assert (found.rows, found.errors) == (expected.rows, expected.errors) == (22, 2)
    dataset = lance.dataset(tmp_path / "out" / "features.lance")
    table = pq.ParquetDataset(tmp_path / "parquet" / "features").read()
    assert dataset.schema.metadata == table.schema.metadata
    assert dataset.to_table().to_pylist() == table.to_pylist()


def test_what_is_left_of_other_runs_does_not_count(job: ExtractJob, engine: Engine, tmp_path: Path) -> None:
    features(job, engine)
    before = lance.dataset(tmp_path / "out" / "features.lance").to_table()
    (tmp_path / "out" / "shards" / "000001.json").unlink()  # as if killed before it was written
    assert features(job, engine).complete
    assert lance.dataset(tmp_path / "out" / "features.lance").to_table().equals(before)
    assert len(list((tmp_path / "out" / "features.lance" / "data").iterdir())) == 4
    retried = dataclasses.replace(job, retry_failed=True)
    assert features(retried, engine).rows == 22
    assert lance.dataset(tmp_path / "out" / "features.lance").to_table().equals(before)


def test_lance_behind_a_url_is_refused(job: ExtractJob, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="written to local folders only"):
        features(dataclasses.replace(job, out="memory://bucket/lance"), engine)
