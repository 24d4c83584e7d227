"""The folder in which torch keeps what it has compiled: what a killed compiler left half-written is removed.

torch takes a library that exists for a finished one. The linker writes in place, so one that was killed leaves a file
that no run can load any more, and every later run with that kernel would stop.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
LINKING = 30.0  # seconds for which a library may still be written by another run
ELF = struct.Struct("<4sB35xQ10xHH2x")  # magic, class, offset of the section headers, size and number of them


def remove_unfinished(older: float = LINKING) -> list[Path]:
    """Remove libraries that end early and were last written `older` seconds ago or before; returns them."""
    folder = os.environ.get(FOLDER, "")
    removed = []
    for path in Path(folder).glob("*/*.so") if folder else ():
        with contextlib.suppress(OSError):  # another run has just removed it
            if time.time() - path.stat().st_mtime >= older and is_unfinished(path):
                path.unlink()
                removed.append(path)
    return removed


def is_unfinished(path: Path) -> bool:
    """Whether a library is empty or ends before its section headers, which linkers write last."""
    size = path.stat().st_size
    if not size:
        return True
    with path.open("rb") as file:
        head = file.read(ELF.size)
    if head[:5] != b"\x7fELF\x02":  # of another system: nothing is known of its format here
        return False
    if len(head) < ELF.size:
        return True
    _, _, start, each, count = ELF.unpack(head)
    return bool(size < start + each * count)
