"""What training commands set before they import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mixmim_serve.cli.environment import SLEEP, cache_folder, prepare_training

NAMES = (*SLEEP, "KMP_BLOCKTIME", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE")
COMMANDS = {
    "pretrain": ["photos", "--out", "run"],
    "finetune": ["photos", "--from", "tiny", "--out", "run"],
    "probe": ["photos", "--from", "tiny"],
    "evaluate": ["photos", "--from", "tiny"],
    "replay": ["run"],
}

# Runs a command until it imports torch, and prints what the environment is then.
UNTIL_TORCH = """
import os, sys
from mixmim_serve.cli import app

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*(os.environ.get(each, "") for each in sys.argv[1].split(",")), sep="|", flush=True)
            os._exit(0)

assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch())
app(sys.argv[2:])
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment in which the user has set nothing."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_sets_it_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    asked = "OMP_WAIT_POLICY,GOMP_SPINCOUNT,TORCHINDUCTOR_FX_GRAPH_CACHE,TORCHINDUCTOR_CACHE_DIR"
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, asked, command, *COMMANDS[command]],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("passive|0|1|"), done.stderr
    assert done.stdout.strip().endswith("mixmim-serve/torchinductor")


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("name", [*SLEEP, "KMP_BLOCKTIME"])
def test_what_the_user_has_set_about_waiting_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One variable set by the user leaves the others unset too: GOMP_SPINCOUNT would outdo OMP_WAIT_POLICY."""
    monkeypatch.setenv(name, "the user's")
    prepare_training()
    assert {each: os.environ[each] for each in (*SLEEP, "KMP_BLOCKTIME") if each in os.environ} == {name: "the user's"}


@pytest.mark.usefixtures("unset")
def test_the_compilers_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare_training()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder() / "torchinductor")
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "cache" / "mixmim-serve"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    prepare_training()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    assert os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] == "0"
