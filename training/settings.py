"""`--set key=value`: any field of a configuration, by its name; nested ones as `augment.mixup`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from mixmim_serve.errors import ConfigError

Config = TypeVar("Config")


def apply(config: Config, settings: Iterable[str]) -> Config:
    """The configuration with the settings, each `key=value`, all checked together.

    Raises:
        ConfigError: for a setting without `=`, an unknown key (naming the nearest ones) or a value of another type.
    """
    values: dict[str, Any] = {}
    known = field_types(type(config))
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {setting}: expected key=value, such as epochs=50.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise ConfigError(f"unknown setting {key!r}: did you mean {' or '.join(near)}?")
        values[key] = parse(key, text.strip(), known[key])
    made: Config = replace(config, values)
    return made


def replace(config: Any, values: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` that takes dotted names."""
    own = {key: value for key, value in values.items() if "." not in key}
    for parent in {key.partition(".")[0] for key in values if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{parent}.")}
        own[parent] = replace(getattr(config, parent), inner)
    return dataclasses.replace(config, **own)


def field_types(cls: Any) -> dict[str, Any]:
    """Type of every field, nested ones under dotted names."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{inner}": value for inner, value in field_types(kind).items()}
        else:
            found[name] = kind
    return found


def parse(key: str, text: str, kind: Any) -> Any:
    """The text as a value of the field's type.

    Raises:
        ConfigError: when it is none.
    """
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            return text.lower() in ("true", "yes", "on", "1")
        raise ConfigError(f"{key} is true or false, got {text!r}.")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{key} is {describe(kind)}, got {text!r}.") from error
    if kind is float and type(value) is int:
        value = float(value)
    if (
        typing.get_origin(kind) is tuple
        and isinstance(value, tuple | list)
        and len(value) == len(typing.get_args(kind))
    ):
        return tuple(float(number) for number in value)
    if type(value) is not kind:
        raise ConfigError(f"{key} is {describe(kind)}, got {text!r}.")
    return value


def describe(kind: Any) -> str:
    """A type in words."""
    if isinstance(kind, types.GenericAlias):
        return f"{len(typing.get_args(kind))} numbers, such as 0.9,0.95"
    return {int: "a whole number", float: "a number"}[kind]


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict` for a configuration that was saved as JSON.

    Raises:
        ConfigError: for unknown fields.
    """
    own: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r} in a saved configuration: it is of another version.")
        if dataclasses.is_dataclass(hints[name]):
            own[name] = from_dict(typing.cast(Any, hints[name]), value)
        else:
            own[name] = tuple(value) if isinstance(value, list) else value
    return cls(**own)
