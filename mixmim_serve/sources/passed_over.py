"""Files of a folder or archive that are not read: counted by kind, and named in one sentence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

from mixmim_serve import heif

VIDEO = frozenset({".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"})
RAW = frozenset(
    {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
)
OTHER_IMAGES = frozenset({".dcm", ".eps", ".exr", ".fits", ".ico", ".jp2", ".jxl", ".ppm", ".psd", ".svg", ".tga"})
SHOWN = 8  # kinds in a sentence


def counted(names: Iterable[str]) -> dict[str, int]:
    """Files by lower-case suffix, the most frequent first; "" for those without."""
    return dict(Counter(os.path.splitext(name)[1].lower() for name in names).most_common())


def sentence(counts: Mapping[str, int]) -> str:
    """Such as `passed over 3 files: .heic (2; pip install ...), .mov (1; video)`; empty when there are none."""
    total = sum(counts.values())
    if not total:
        return ""
    kinds = [f"{suffix or 'without a suffix'} ({_note(suffix, count)})" for suffix, count in counts.items()]
    more = f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
    files = "file" if total == 1 else "files"
    return f"passed over {total:,} {files}: {', '.join(kinds[:SHOWN])}{more}"


def _note(suffix: str, count: int) -> str:
    if suffix in heif.SUFFIXES:
        return f"{count:,}; {heif.EXTRA}"
    if suffix in VIDEO:
        return f"{count:,}; video"
    if suffix in RAW:
        return f"{count:,}; raw photo: develop it to JPEG"
    return f"{count:,}; save it as PNG" if suffix in OTHER_IMAGES else f"{count:,}"
