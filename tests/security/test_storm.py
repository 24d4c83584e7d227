"""A good client next to each attack, for a short time: no errors, bounded memory, SIGTERM obeyed.

Latency is no matter of a test: `make attack` measures it, on a machine that does nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from serving import PHOTOS

sys.path.insert(0, str(REPOSITORY))

from benchmarks.attack_files import write_all
from benchmarks.attack_traffic import ATTACKS
from benchmarks.attacks import ALL, GRACE, measure
from benchmarks.attacks_report import missed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MIXMIM_STORM" not in os.environ, reason="needs a quiet machine: MIXMIM_STORM=1 make test-slow"),
    pytest.mark.skipif(sys.platform != "linux", reason="attacks come from 127.0.0.2, which only Linux has"),
]
CASES = [*((name, "other") for name in ATTACKS), (ALL, "other"), (ALL, "keys")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    write_all(folder)
    return folder


@pytest.mark.parametrize(("name", "source"), CASES)
def test_a_good_client_next_to_an_attack(files: Path, name: str, source: str) -> None:
    row = measure(name, source, files, [PHOTOS["hat"].read_bytes(), PHOTOS["shoes"].read_bytes()], seconds=1, rounds=1)
    failures = {part for client in row["clients"] for part in missed(row, client, GRACE)} - {"p99"}
    assert not failures, row
    assert all(client["statuses"]["200"] for client in row["clients"]), row
