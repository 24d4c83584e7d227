"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SHARED_GOLDEN = REPOSITORY.parent / "shared" / "golden"  # the larger originals, where they lie beside the checkout


def golden_sets() -> list[pytest.param]:
    """Every set of golden arrays at hand: (folder, name of the network, resized to)."""
    sets = [pytest.param((GOLDEN, "mini", "96_to_128"), id="mini")]
    if SHARED_GOLDEN.is_dir():
        sets.append(pytest.param((SHARED_GOLDEN, "tiny", "128_to_192"), id="tiny"))
    return sets
