"""The README is a test: its commands run as they stand and print what it shows, numbers aside."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from conftest import REPOSITORY
from test_server import serve

from mixmim_serve.cli import app

README = (REPOSITORY / "README.md").read_text()
SCREENS, LINES_OF_ONE = 3, 52
MIXMIM = [sys.executable, "-c", "from mixmim_serve.cli import main; main()"]


@dataclass
class Shown:
    """A command of the README, and the lines below it."""

    command: str
    output: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """Without the comment behind it."""
        return shlex.split(self.command, comments=True)


def shown(page: str) -> list[Shown]:
    """Every `$ command` of a page in order; one may go on behind a backslash."""
    found: list[Shown] = []
    for line in (line[4:] for line in page.splitlines() if line.startswith("    ")):
        if line.startswith("$ "):
            found.append(Shown(line[2:]))
        elif found and found[-1].command.endswith("\\"):
            found[-1].command = found[-1].command[:-1] + line.strip()
        elif found:
            found[-1].output.append(line)
    return found


SHOWN = shown(README)
CURL = [each for each in SHOWN if each.words[0] == "curl"]
TRAINING = ("pretrain", "probe", "finetune", "export", "evaluate")  # run by tests of their own
LOCAL = [each for each in SHOWN if each.words[0] == "mixmim" and each.words[1] not in TRAINING]


def assert_prints(actual: str, expected: list[str]) -> None:
    """The same lines; numbers and fingerprints depend on the machine, and `...` stands for anything."""
    lines = actual.splitlines()
    assert len(lines) >= len(expected), actual
    for line, wanted in zip(lines, expected, strict=False):
        pattern = re.escape(generic(wanted)).replace(re.escape("..."), ".*")
        assert re.match(pattern, generic(line)), f"the README shows\n{wanted}\nbut it prints\n{line}"


def generic(line: str) -> str:
    """A line without its numbers."""
    return re.sub(r"-?\d+(\.\d+)?(e-\d+)?", "#", re.sub(r"[0-9a-f]{32}", "fingerprint", line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the README's relative paths hold; what one command writes the next one finds."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    (folder / "photos").symlink_to(REPOSITORY / "examples")
    return folder


def test_it_fits_on_three_screens() -> None:
    assert len(README.splitlines()) <= SCREENS * LINES_OF_ONE


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_lines(folder: Path) -> None:
    assert len(CURL) >= 5
    with serve(REPOSITORY / "mixmim_serve" / "bundles" / "tiny", folder) as server:
        server.wait_until_ready()
        for each in CURL:
            words = [word.replace(":3000", f":{server.port}") for word in each.words]
            command = [*words, "--fail", "--silent", "--max-time", "20"]
            result = subprocess.run(command, check=True, cwd=folder, capture_output=True)
            assert_prints(result.stdout.decode(), each.output)
    assert (folder / "hat.npy").read_bytes()[:6] == b"\x93NUMPY"
    assert (folder / "panel.png").read_bytes()[:4] == b"\x89PNG"


def test_commands_on_the_shipped_model(folder: Path) -> None:
    pytest.importorskip("torch")  # for `mixmim check`
    assert {each.words[1] for each in LOCAL} == {"embed", "classify", "extract", "neighbours", "duplicates", "check"}
    for each in LOCAL:
        result = subprocess.run([*MIXMIM, *each.words[1:]], cwd=folder, env=os.environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert_prints(result.stdout, each.output)
    assert (folder / "vectors.npy").exists()
    assert "<img" in (folder / "near.html").read_text()


def test_every_command_and_option_exists() -> None:
    """In the tour, in inline code and in the table of results."""
    known = typer.main.get_command(app).commands
    inline = [Shown(line) for line in re.findall(r"`(mixmim [^`]+)`", README)]
    for each in [*SHOWN, *inline]:
        if each.words[0] != "mixmim":
            continue
        assert each.words[1] in known, each.command
        options = {option for parameter in known[each.words[1]].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in each.words if word.startswith("--")}
        assert given <= options, each.command


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"it"}
    assert {"serve", "test", "docs"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
