"""Where a result comes from: the code, and the command that made it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixmim_serve.cores import usable_cores
from mixmim_serve.engines.hardware import processor


def about(script: str, arguments: Sequence[str] | None, packages: Iterable[str]) -> dict[str, Any]:
    """What numbers depend on: when, where, which code and which versions, by which command."""
    return {
        "date": date.today().isoformat(),
        "command": command(script, arguments),
        "commit": commit(),
        "cores": usable_cores(),
        "hardware": processor(),
        "versions": {name: version(name) for name in packages},
    }


def heading(title: str, found: Mapping[str, Any]) -> list[str]:
    """The first lines of a report: a title, and what `about` found."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"# {title}, {found['cores']} cores of {found['hardware']}, {found['date']}",
        "",
        f"`{found['command']}`; commit {found['commit']}; {versions}.",
    ]


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
