"""Environment variables that torch's libraries read once, as they are loaded: set before torch is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# libgomp, which torch's wheels for Linux bring, lets a thread without work spin for milliseconds. When another process
# needs the core, the spinning thread takes it from the very thread that it waits for.
SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
OTHERS = {"KMP_BLOCKTIME"}  # Intel's OpenMP; a user who sets it has decided as well
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def prepare_training() -> None:
    """Let waiting threads sleep, and keep what torch.compile has compiled; what the user has set stays.

    Child processes inherit it; those of torchrun run a training command themselves.
    """
    if not (SLEEP.keys() | OTHERS) & os.environ.keys():  # one alone would change what the others mean
        os.environ.update(SLEEP)
    os.environ.setdefault(COMPILED, str(cache_folder() / "torchinductor"))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # the default of newer versions of torch


def cache_folder() -> Path:
    """The folder of the user's for what can be made again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mixmim-serve"
