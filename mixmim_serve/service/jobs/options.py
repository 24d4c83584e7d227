"""Options of a job, each declared once: `schema` documents them, `parse_options` reads them from a request."""

from __future__ import annotations

from typing import Any

from mixmim_serve.bundle import Bundle
from mixmim_serve.config import unknown
from mixmim_serve.errors import ConfigError, quoted
from mixmim_serve.extract.options import DTYPES, ExtractOptions, Resources

MAX_FAILURES = "max_failures"  # belongs to `Resources`; the others to `ExtractOptions`
_OPTIONS: dict[str, dict[str, Any]] = {
    "features": {"type": "array", "items": {"type": "string"}, "default": []},
    "classes": {
        "type": "boolean",
        "description": "Also store each image's most probable class; by default unless the model is the shipped one.",
    },
    "head": {
        "type": "string",
        "default": ExtractOptions.head,
        "description": "The head that classes and logits are from, as /model lists them; empty: the default one.",
    },
    # Lance's files are read only by its own library, and from a folder.
    "format": {"enum": ["parquet", "npy"], "default": ExtractOptions.format},
    "dtype": {"enum": list(DTYPES), "default": ExtractOptions.dtype},
    "batch": {"type": "integer", "minimum": 1, "maximum": 256, "default": ExtractOptions.batch},
    "images": {
        "type": "integer",
        "minimum": 0,
        "maximum": 1_000_000,
        "default": 0,
        "description": "Images per shard; 0 chooses.",
    },
    "fast_jpeg": {"type": "boolean", "default": False},
    MAX_FAILURES: {"type": "number", "minimum": 0, "maximum": 1, "default": Resources.max_failures},
}
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "array": ("a list of names", (list,)),
    "string": ("a name", (str,)),
    "integer": ("a whole number", (int,)),
    "boolean": ("true or false", (bool,)),
    "number": ("a number", (int, float)),
}


def schema() -> dict[str, Any]:
    """The JSON schema of each option, by name."""
    return _OPTIONS


def parse_options(values: object, bundle: Bundle) -> dict[str, Any]:
    """Options of a job from JSON, checked and completed with the defaults.

    Raises:
        ConfigError: for an option that is unknown, of another type, out of range or not in this model.
    """
    if not isinstance(values, dict):
        raise ConfigError("options must be a JSON object.")
    for name, value in values.items():
        if name not in _OPTIONS:
            raise unknown("option", name, _OPTIONS)
        _check(name, value, _OPTIONS[name])
    resources = Resources(values.get(MAX_FAILURES, Resources.max_failures))
    options = ExtractOptions(**{name: value for name, value in values.items() if name != MAX_FAILURES})
    options.check(bundle)
    return options.decided(bundle).to_dict() | {MAX_FAILURES: resources.max_failures}


def _check(name: str, value: Any, option: dict[str, Any]) -> None:
    if "enum" in option:
        if value not in option["enum"]:
            raise ConfigError(f"{name} must be one of {', '.join(option['enum'])}, got {quoted(value)}.")
        return
    expected, types = _TYPES[option["type"]]
    valid = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if valid and list in types:
        valid = all(isinstance(item, str) for item in value)
    if "minimum" in option:
        expected += f" from {option['minimum']:,} to {option['maximum']:,}"
        valid = valid and option["minimum"] <= value <= option["maximum"]
    if not valid:
        raise ConfigError(f"{name} must be {expected}, got {quoted(value)}.")
