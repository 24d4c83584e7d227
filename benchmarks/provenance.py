"""Where a result comes from: hardware, versions, commit and command."""

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
    """Date, command, commit, hardware and package versions of a measurement."""
    return {
        "date": date.today().isoformat(),
        "command": command(script, arguments),
        "commit": commit(),
        "cores": usable_cores(),
        "hardware": processor(),
        "versions": {name: version(name) for name in packages},
    }


def heading(title: str, facts: Mapping[str, Any]) -> list[str]:
    """The first lines of a report: a title, and the values of `about`."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return [
        f"# {title}, {facts['cores']} cores of {facts['hardware']}, {facts['date']}",
        "",
        f"`{facts['command']}`; commit {facts['commit']}; {versions}.",
    ]


def commit() -> str:
    """The checked-out commit, and whether files differ from it; empty outside a checkout."""
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def git(*arguments: str) -> str:
    """The output of git, empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def command(script: str, arguments: Sequence[str] | None) -> str:
    """The command line of benchmarks/`script`.py; the arguments default to those of this process."""
    return " ".join([f"python -m benchmarks.{script}", *(sys.argv[1:] if arguments is None else arguments)])
