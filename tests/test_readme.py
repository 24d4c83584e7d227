"""The README is a test: its commands run as they stand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_server import serve

LINES = [line.strip() for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("    ")]
CURL = [line for line in LINES if line.startswith("curl ")]
SHIPPED = [line.partition(" #")[0].strip() for line in LINES if line.startswith("mixmim ") and " tiny" in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place where the README's relative paths hold."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "photos").symlink_to(REPOSITORY / "examples")
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_lines(folder: Path) -> None:
    assert len(CURL) >= 5
    with serve(REPOSITORY / "mixmim_serve" / "bundles" / "tiny", folder) as server:
        server.wait_until_ready()
        for line in CURL:
            command = shlex.split(line.replace(":3000", f":{server.port}"))
            subprocess.run([*command, "--fail", "--silent", "--max-time", "20"], check=True, cwd=folder)
    assert (folder / "hat.npy").read_bytes()[:6] == b"\x93NUMPY"
    assert (folder / "panel.png").read_bytes()[:4] == b"\x89PNG"


QUICKLY = {"bench": ["--seconds", "0.1", "--rounds", "1", "--batch", "1"]}  # the whole of it takes minutes


@pytest.mark.parametrize("line", SHIPPED)
def test_commands_on_the_shipped_model(line: str, folder: Path) -> None:
    mixmim = [sys.executable, "-c", "from mixmim_serve.cli import main; main()"]
    result = subprocess.run(
        [*mixmim, *shlex.split(line)[1:], *QUICKLY.get(line.split()[1], [])],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(SHIPPED) >= 5
