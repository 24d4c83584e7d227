"""Where a result comes from: the code, and the command that made it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def commit() -> str:
    """The commit that is checked out, and whether files differ from it; nothing outside a checkout."""
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def git(*arguments: str) -> str:
    """What git says, or nothing outside a checkout."""
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def command(script: str, arguments: Sequence[str] | None) -> str:
    """The command line of benchmarks/`script`.py, as it would be typed; those of this process when none are given."""
    return " ".join([f"python -m benchmarks.{script}", *(sys.argv[1:] if arguments is None else arguments)])
