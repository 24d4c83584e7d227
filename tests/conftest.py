"""What several test files share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving import TestClient

    from mixmim_serve.engines import Engine

# Before anything loads torch, and for every process that a test starts: the networks here are too small to share, and
# threads that wait for each other on a busy machine made the suite two and a half times slower (79 s against 200 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = REPOSITORY.parent / "shared" / "golden"  # the larger originals, where they lie beside the checkout


def golden_sets() -> list[pytest.param]:
    """Every set of golden arrays at hand: (folder, name of the network, resized to)."""
    sets = [pytest.param((GOLDEN, "mini", "96_to_128"), id="mini")]
    if SHARED_GOLDEN.is_dir():
        sets.append(pytest.param((SHARED_GOLDEN, "tiny", "128_to_192"), id="tiny"))
    return sets


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a very small random network at 64 px, with a decoder and a head of three classes."""
    import torch

    from mixmim_serve.config import Architecture, DecoderConfig, Preprocessing
    from mixmim_serve.description import Description
    from mixmim_serve.model import build_model
    from mixmim_serve.model.checkpoint import save_checkpoint

    torch.manual_seed(0)
    arch = Architecture(8, (1, 1, 1, 1), (1, 1, 2, 2), 64, decoder=DecoderConfig(16, 1, 2), num_classes=3)
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    description = Description(arch, Preprocessing.evaluation(64), ("cat", "dog", "owl"), {"made_by": "tests"})
    save_checkpoint(path, build_model(arch).state_dict(), description)
    return path


@pytest.fixture(scope="session")
def exported_bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `small_checkpoint`; read-only, `bundle_copy` gives one to break."""
    from export.build import export_bundle

    target = tmp_path_factory.mktemp("bundle") / "small"
    export_bundle(small_checkpoint, target)
    return target


@pytest.fixture
def bundle_copy(exported_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `exported_bundle` that a test may alter."""
    return Path(shutil.copytree(exported_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def engine(exported_bundle: Path) -> Engine:
    """ONNX Runtime with `exported_bundle`."""
    from mixmim_serve.engines import open_engine

    return open_engine(exported_bundle, threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    """A client of the HTTP routes over `engine`."""
    from serving import client_of

    with client_of(engine) as client:
        yield client
