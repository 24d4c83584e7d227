"""For mkdocstrings: the comment behind a field is its description, as the code writes fields of dataclasses."""

from __future__ import annotations

import io
import tokenize
from typing import Any

import griffe


class TrailingComments(griffe.Extension):
    """Give each attribute without a docstring the comment on its line, and on the lines of comments that follow."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for each attribute that was read from the source."""
        if attr.docstring is None and attr.lineno is not None and (text := _comment(attr.source)):
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=attr)


def _comment(source: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source.strip()).readline))
    except (tokenize.TokenError, IndentationError):
        return ""
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return " ".join(comments).partition("  # noqa")[0].rstrip(". ")
