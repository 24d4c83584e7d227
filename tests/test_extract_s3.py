"""Source and OUT in S3, against moto's server on this machine.

moto and s3fs need an older python-dateutil than the pinned one, so they are not in the extra `dev`; in an environment
of their own: pip install '.[cpu,extract]' s3fs 'moto[server]' pytest; pytest tests/test_extract_s3.py
"""

from __future__ import annotations

import io
import json
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from extracting import features, files_of, small

from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import Engine, open_engine
from mixmim_serve.errors import OutputError
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.lock import locked

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("default")  # botocore's own

PHOTOS = sorted((REPOSITORY / "examples").glob("*.jpg"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket with the photos of examples/ as objects and in a tar shard; what s3fs gives for it."""
    import s3fs

    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "of-nobody", "AWS_SECRET_ACCESS_KEY": "of-nobody", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # buckets outlive their server
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in PHOTOS:
            filesystem.pipe(f"bucket/photos/{path.name}", path.read_bytes())
            tar.add(path, path.name)
    filesystem.pipe("bucket/tars/photos.tar", packed.getvalue())
    yield filesystem
    running.stop()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(DEFAULT_BUNDLE, "onnx", threads=1)


@pytest.mark.parametrize("source", ["s3://bucket/photos", "s3://bucket/tars/*.tar"])
def test_s3_holds_what_a_folder_holds(bucket: Any, engine: Engine, tmp_path: Path, source: str) -> None:
    features(small(engine, REPOSITORY / "examples", tmp_path / "out", images=5), engine)
    job = small(engine, source, "s3://bucket/out", images=5)
    assert features(job, engine).complete
    local = files_of(tmp_path / "out" / "features")
    for name, data in local.items():
        if "tar" in source:  # keys name the shard, too
            found = pq.read_table(io.BytesIO(bucket.cat(f"bucket/out/features/{name}")))
            assert found["embedding"].equals(pq.read_table(io.BytesIO(data))["embedding"])
        else:
            assert bucket.cat(f"bucket/out/features/{name}") == data
    assert not bucket.exists("bucket/out/.lock")
    assert len(FeatureFolder("s3://bucket/out")) == len(PHOTOS)

    bucket.rm("bucket/out/shards/000001.json")
    before = bucket.cat("bucket/out/features/000001.parquet")
    assert features(job, engine).complete
    assert bucket.cat("bucket/out/features/000001.parquet") == before
    assert json.loads(bucket.cat("bucket/out/manifest.json"))["complete"]


def test_a_changed_bucket_and_a_second_run_are_refused(bucket: Any, engine: Engine) -> None:
    job = small(engine, "s3://bucket/photos", "s3://bucket/out", images=5)
    with locked(Folder("s3://bucket/out")), pytest.raises(OutputError, match="another run"):
        features(job, engine)
    features(job, engine)
    bucket.rm(f"bucket/photos/{PHOTOS[0].name}")
    with pytest.raises(OutputError, match="has changed since s3://bucket/out was started"):
        features(job, engine)
