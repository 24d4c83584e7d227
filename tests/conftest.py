"""What several test files share."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from mixmim_serve.files import atomic_folder

if TYPE_CHECKING:
    from serving import TestClient

    from mixmim_serve.engines import Engine

# Before anything loads torch, and for every process that a test starts: the networks here are too small to share, and
# threads that wait for each other on a busy machine made the suite two and a half times slower (79 s against 200 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = REPOSITORY.parent / "shared" / "golden"  # the larger originals, where they lie beside the checkout


# The files that take longest, measured in seconds of a processor; a process that is given one of them at last is alone.
LONGEST = (
    "test_precisions",
    "test_distributed",
    "test_export",
    "test_training",  # beside test_export, because it does not wait for the same bundle
    "test_resume",
    "test_jobs",
    "test_readme",
    "test_publish",
    "test_benchmarks",
    "test_tensorrt",
    "test_bench",
    "test_faults",
    "test_bento",
    "test_cli",
    "test_finetuning",
    "test_engines",
    "test_service_robustness",
    "test_openapi",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of LONGEST."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def golden_sets() -> list[pytest.param]:
    """Every set of golden arrays at hand: (folder, name of the network, resized to)."""
    sets = [pytest.param((GOLDEN, "mini", "96_to_128"), id="mini")]
    if SHARED_GOLDEN.is_dir():
        sets.append(pytest.param((SHARED_GOLDEN, "tiny", "128_to_192"), id="tiny"))
    return sets


# Without torch (`make test-serving`), the tests of what serves without it run on a bundle that was exported before.
READY_BUNDLE = "MIXMIM_TEST_BUNDLE"
_NEEDS_TORCH = re.compile(
    r"^(from|import) (torch|onnx|training|export|exporting|benchmarks|test_cli|test_resume|mixmim_serve\.model)\b",
    re.MULTILINE,
)
if importlib.util.find_spec("torch") is None:
    _TESTS = Path(__file__).parent
    collect_ignore = [
        str(path.relative_to(_TESTS)) for path in _TESTS.rglob("test_*.py") if _NEEDS_TORCH.search(path.read_text())
    ]

BuildOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> BuildOnce:
    """Builds a named folder once for all processes of the suite; each process gets a copy of its own."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    shared.mkdir(exist_ok=True)

    def build_once(name: str, build: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                with atomic_folder(shared / name) as folder:
                    build(folder)
        return Path(shutil.copytree(shared / name, tmp_path_factory.mktemp("copy") / name))

    return build_once


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a very small random network at 64 px, with a decoder and a head of three classes."""
    from exporting import write_small_checkpoint

    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small.safetensors")


@pytest.fixture(scope="session")
def exported_bundle(request: pytest.FixtureRequest, build_once: BuildOnce) -> Path:
    """The bundle of `small_checkpoint`; read-only, `bundle_copy` gives one to break."""

    def export(folder: Path) -> None:
        if READY_BUNDLE in os.environ:
            shutil.copytree(os.environ[READY_BUNDLE], folder / "small")
            return
        from export.build import export_bundle

        export_bundle(request.getfixturevalue("small_checkpoint"), folder / "small")

    return build_once("exported", export) / "small"


@pytest.fixture(scope="session")
def bundle_in_every_precision(small_checkpoint: Path, exported_bundle: Path, build_once: BuildOnce) -> Path:
    """The bundle of `small_checkpoint` with graphs in fp32 (those of `exported_bundle`), fp16 and bf16; read-only."""

    def export(folder: Path) -> None:
        from exporting import export_every_precision

        export_every_precision(small_checkpoint, folder / "small", exported_bundle)

    return build_once("precisions", export) / "small"


@pytest.fixture
def bundle_copy(exported_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `exported_bundle` that a test may alter."""
    return Path(shutil.copytree(exported_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("certificates")))


@pytest.fixture(scope="module")
def engine(exported_bundle: Path) -> Engine:
    """ONNX Runtime with `exported_bundle`."""
    from mixmim_serve.engines import open_engine

    return open_engine(exported_bundle, "onnx", threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    """A client of the HTTP routes over `engine`."""
    from serving import client_of

    with client_of(engine) as client:
        yield client


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos in one folder: no labels, no sub-folders."""
    from pictures import photo

    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        photo(number).save(folder / f"{number:02d}.jpg")
    return folder


@pytest.fixture(scope="session")
def spoilt(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 of the photos at two depths, a text with an image's name, a photo cut in half, and what is no image."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "holiday" / "2026").mkdir(parents=True)
    for number, path in enumerate(sorted(photos.iterdir())[:22]):
        (folder / ("holiday/2026" if number % 2 else "") / path.name).write_bytes(path.read_bytes())
    (folder / "letter.jpg").write_text("Dear all, no image here.")
    whole = (photos / "23.jpg").read_bytes()
    (folder / "holiday" / "cut.jpeg").write_bytes(whole[: len(whole) // 2])
    (folder / "labels.csv").write_text("00.jpg,1\n")
    (folder / ".hidden.jpg").write_text("of the file manager")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val, with two classes that a person tells apart at once: 12 and 4 images each."""
    from PIL import Image

    root = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 12), ("val", 4)):
        for name, colour in (("blue", (20, 40, 220)), ("red", (220, 40, 20))):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, value + 3 * number) for value in colour)
                Image.new("RGB", (48, 40), shade).save(root / part / name / f"{number}.png")
    return root
