"""Coverage-guided fuzzing of `mixmim_serve.containers`; optional, and no part of the tests: `pip install atheris`.

    python tests/security/fuzz_containers.py CORPUS [tests/data/robustness/good ...] -max_total_time=600

New inputs are kept in the first folder. A crash is an exception other than `ImageError`, a cost that is no number, or
(with -timeout=1) a file that takes a second.
"""

from __future__ import annotations

import math
import sys

import atheris

with atheris.instrument_imports(include=["mixmim_serve.containers"]):
    from mixmim_serve.containers import inspect
from mixmim_serve.errors import ImageError


def check(data: bytes) -> None:
    """Any bytes are read or refused."""
    try:
        container = inspect(data)
    except ImageError as error:
        if not str(error).endswith("."):
            raise
        return
    if not (math.isfinite(container.decode_cost) and container.decode_cost >= 0 <= container.width):
        raise AssertionError(container)


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
