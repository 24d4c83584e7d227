"""JSON from files that others may have written, within limits of size and nesting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mixmim_serve.files import read_bounded

MAX_BYTES = 256_000_000  # of a file; the manifest of 65,536 shards has some 25 MB
MAX_DEPTH = 64  # of objects and arrays within each other; ours have 6
# A string may lack its last quote, or each quote in it would be tried as the start of another one.
_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON value in a regular file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: it is too large, not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_bounded(path, max_bytes))


def parse_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: the text is not UTF-8, not JSON, or nested more than `MAX_DEPTH` deep.
    """
    if isinstance(text, bytes):
        text = text.decode()
    # The parser recurses, so this comes first. A text with fewer brackets cannot be that deep.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    return json.loads(text)


def _check_depth(text: str) -> None:
    depth = 0
    for token in _TOKENS.finditer(text):
        kind = text[token.start()]
        if kind in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        elif kind in "]}":
            depth -= 1
