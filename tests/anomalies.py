"""What the tests of alarms share: normal and odd photos, and a bundle that is calibrated on the normal ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import BuildOnce
from PIL import Image
from serving import PHOTOS

from mixmim_serve.anomaly.calibrate import Options, calibrate
from mixmim_serve.anomaly.calibration import store
from mixmim_serve.bundle import open_bundle
from mixmim_serve.engines import open_engine
from mixmim_serve.sources import open_source

NORMAL, ODD = 60, 8


def write_photos(folder: Path, count: int, *, odd: bool = False, seed: int = 0) -> Path:
    """Crops of one photo, a little brighter or darker; odd ones have a patch of noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(PHOTOS["hat"]) as opened:
        photo = opened.convert("RGB").resize((100, 100))
    for number in range(count):
        left, top = rng.integers(0, 6, 2)
        pixels = np.asarray(photo.crop((left, top, left + 76, top + 76))) * rng.uniform(0.97, 1.03)
        if odd:
            y, x = rng.integers(4, 36, 2)
            pixels[y : y + 36, x : x + 36] = rng.uniform(0, 255, (36, 36, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def normal_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos to calibrate on."""
    return write_photos(tmp_path_factory.mktemp("normal"), NORMAL)


@pytest.fixture(scope="session")
def calibrated_bundle(exported_bundle: Path, normal_photos: Path, build_once: BuildOnce) -> Path:
    """`exported_bundle`, calibrated for ONNX Runtime with few patches; read-only."""

    def build(folder: Path) -> None:
        copied = open_bundle(exported_bundle).copy(folder_of(folder))
        engine = open_engine(copied, "onnx")
        store(copied, calibrate(engine, open_source(normal_photos), Options(patches=200))[0])

    return build_once("calibrated", build) / "small"


def folder_of(folder: Path) -> Path:
    """A new folder for the bundle, of the name that it keeps."""
    (folder / "small").mkdir()
    return folder / "small"
