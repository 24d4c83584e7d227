"""The examples run as they stand, on the photos beside them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image

from mixmim_serve.bundle import open_bundle

EXAMPLES = REPOSITORY / "examples"


def run(script: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder of its own; warnings of libraries are the user's, as in a terminal."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_embed_and_search(tmp_path: Path) -> None:
    result = run("embed_and_search.py", "--top", 5, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "embedded 12 photos" in result.stdout
    near, pairs = result.stdout.split("most similar pairs")
    assert "hat.jpg" not in re.findall(r"^  \S+  (\S+)$", near, re.MULTILINE)
    cosines = [float(cosine) for cosine in re.findall(r"^  (\S+)  \S+\.jpg$", near, re.MULTILINE)]
    assert len(cosines) == 5
    assert cosines == sorted(cosines, reverse=True)
    assert len(re.findall(r"^  0\.\d+  \S+\.jpg  \S+\.jpg$", pairs, re.MULTILINE)) == 5


def test_embed_and_search_finds_a_copy_and_skips_what_is_broken(tmp_path: Path) -> None:
    for name in ("hat.jpg", "pants.jpg"):
        (tmp_path / name).write_bytes((EXAMPLES / name).read_bytes())
    Image.open(EXAMPLES / "hat.jpg").save(tmp_path / "copy.jpg", quality=60)
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    result = run("embed_and_search.py", "--photos", tmp_path, "--top", 1, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "skipped broken.jpg: " in result.stdout
    assert re.search(r"nearest to hat\.jpg\n  (0\.99\d|1\.000)  copy\.jpg\n", result.stdout), result.stdout
    result = run("embed_and_search.py", "--photos", tmp_path, "--query", "cat.jpg", folder=tmp_path)
    assert result.returncode == 1
    assert "cat.jpg is not among the photos" in result.stderr


@pytest.mark.slow
def test_pretrain_to_serve(tmp_path: Path) -> None:
    result = run("pretrain_to_serve.py", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for number in range(1, 6):
        assert f"[{number}/5]" in result.stdout
    assert "linear probe: " in result.stdout
    assert "hat.jpg: 256 numbers from model bundle" in result.stdout
    guesses = dict(re.findall(r"^  0\.\d+  (\w+)()$", result.stdout, re.MULTILINE))
    assert guesses.keys() == {"accessory", "bottom", "top"}
    bundle = open_bundle(tmp_path / "runs" / "example" / "bundle")
    bundle.verify()
    assert bundle.description.labels == ("accessory", "bottom", "top")
