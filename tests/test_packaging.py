"""The wheel and the bento hold what serving needs, and serve with no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bentoml._internal.bento.build_config import BentoBuildConfig
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because a build leaves files behind that the next one would pick up
    for package in ("mixmim_serve", "export", "training"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_the_wheel_holds_the_packages_and_the_shipped_model(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"mixmim_serve", "export", "training"}
    bundle = installed / "mixmim_serve" / "bundles" / "tiny"
    assert {path.name for path in bundle.iterdir()} >= {"config.json", "weights.safetensors", "encoder.onnx"}
    assert len(list((installed / "export" / "photos").glob("*.jpg"))) == 4
    assert (installed / "mixmim_serve" / "py.typed").is_file()
    assert (installed / "mixmim_serve" / "explore" / "map.html").is_file()
    sbom = json.loads((installed / "mixmim_serve" / "sbom.cdx.json").read_text())
    assert {
        f"{entry['name']}=={entry['version']}".lower().replace("_", "-") for entry in sbom["components"]
    } == pinned()


def pinned() -> set[str]:
    """What `make serve` installs, as name==version."""
    text = (REPOSITORY / "requirements" / "serve.txt").read_text()
    return set(re.findall(r"^[\w.-]+==[\w.]+", text, re.MULTILINE))


def test_the_wheel_embeds_without_torch(installed: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None  # importing them now raises ImportError
import numpy as np
import mixmim_serve
from pathlib import Path
from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.engines import open_engine
from mixmim_serve.extract.pipeline import run_files
import mixmim_serve.service.app
assert mixmim_serve.__file__.startswith({str(installed)!r}), mixmim_serve.__file__
hat = Path({str(REPOSITORY / "examples" / "hat.jpg")!r})
(result,) = run_files(open_engine(DEFAULT_BUNDLE, "onnx"), [hat], ["embedding"])
assert result.outputs["embedding"].shape == (256,) and np.isfinite(result.outputs["embedding"]).all()
"""
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=installed)


def test_the_bentofile_is_valid_and_names_our_service() -> None:
    with (REPOSITORY / "bentofile.yaml").open() as file:
        config = BentoBuildConfig.from_yaml(file)
    assert config.service == "mixmim_serve.service.bento:MixMIMService"
    assert config.python.requirements_txt == "requirements/serve.txt"
    names = {requirement.partition("=")[0] for requirement in pinned()}
    assert "onnxruntime" in names
    assert not names & {"torch", "onnx", "onnxscript"}
