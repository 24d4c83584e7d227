"""`--set KEY=VALUE`: any field of a frozen dataclass by its name, nested ones as `augment.mixup`.

Training recipes, extraction jobs and the service parse their settings here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from mixmim_serve.errors import MAX_QUOTED, ConfigError, quoted

Config = TypeVar("Config")

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
UNIONS = (typing.Union, types.UnionType)  # of a type and words: bool | Literal["auto"]
DESCRIPTIONS = {int: "a whole number", float: "a number", bool: "true or false"}


def override(config: Config, assignments: Iterable[str]) -> Config:
    """The configuration with each KEY=VALUE applied; all of them are checked together, by its own checks.

    Raises:
        ConfigError: as `parse_assignments`, or when the configuration refuses the values.
    """
    changed: Config = replace(config, parse_assignments(type(config), assignments))
    return changed


def parse_assignments(cls: Any, assignments: Iterable[str], exclude: Collection[str] = ()) -> dict[str, Any]:
    """Values by (dotted) field name of the dataclass `cls`; fields in `exclude` count as unknown.

    Raises:
        ConfigError: for text without `=`, an unknown key (suggesting the nearest), or a value of the wrong type.
    """
    fields = {name: kind for name, kind in field_types(cls).items() if name not in exclude}
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set must be KEY=VALUE, got {assignment!r}.")
        if key not in fields:
            raise unknown_setting(key, fields)
        values[key] = parse(key, text.strip(), fields[key])
    return values


def unknown_setting(key: str, fields: Iterable[str]) -> ConfigError:
    """The error to raise for a key that is not in `fields`; it suggests the nearest, or lists all."""
    names = sorted(fields)
    suggestions = difflib.get_close_matches(key[:MAX_QUOTED], names, n=3, cutoff=0.5) or names
    return ConfigError(f"unknown setting {quoted(key)}: did you mean {' or '.join(suggestions)}?")


def replace(config: Any, values: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` that accepts dotted names."""
    own = {key: value for key, value in values.items() if "." not in key}
    for parent in {key.partition(".")[0] for key in values if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{parent}.")}
        own[parent] = replace(getattr(config, parent), inner)
    return dataclasses.replace(config, **own)


def field_types(cls: Any) -> dict[str, Any]:
    """The type of every field of a dataclass, nested ones under dotted names."""
    fields: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            fields |= {f"{name}.{inner}": value for inner, value in field_types(kind).items()}
        else:
            fields[name] = kind
    return fields


def parse(key: str, text: str, kind: Any) -> Any:
    """The text as a value of type `kind`: str, Path, bool, int, float, one of them or a word or None, or a tuple.

    Raises:
        ConfigError: when the text is not one.
    """
    if types.NoneType in typing.get_args(kind):  # `bool | None`: what is set is not None
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    try:
        return _parse_tuple(text, kind) if typing.get_origin(kind) is tuple else _parse_one(text, kind)
    except ValueError as error:
        raise ConfigError(f"{key} must be {_describe(kind)}, got {text!r}.") from error


def _parse_tuple(text: str, kind: types.GenericAlias) -> tuple[Any, ...]:
    """`tuple[float, float]` needs two items, `tuple[str, ...]` takes any number; brackets are optional."""
    items = [item.strip() for item in text.strip("()[]").split(",")]
    kinds = typing.get_args(kind)
    if kinds[-1] is Ellipsis:
        return tuple(_parse_one(item, kinds[0]) for item in items if item)
    return tuple(_parse_one(item, each) for item, each in zip(items, kinds, strict=True))


def _parse_one(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) in UNIONS:
        plain, words = _split(kind)
        return text.lower() if text.lower() in words else _parse_one(text, plain)
    if kind is bool:
        return (TRUE + FALSE).index(text.lower()) < len(TRUE)
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def _split(kind: Any) -> tuple[Any, tuple[str, ...]]:
    """`bool | Literal["auto"]` as bool and the words."""
    plain, literal = typing.get_args(kind)
    return plain, typing.get_args(literal)


def _describe(kind: Any) -> str:
    """A type in words."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) in UNIONS:
        plain, words = _split(kind)
        return ", ".join([_describe(plain).replace(" or ", ", "), *words[:-1]]) + f" or {words[-1]}"
    if kinds:
        return "values between commas" if kinds[-1] is Ellipsis else f"{len(kinds)} numbers, such as 0.9,0.95"
    return DESCRIPTIONS[kind]


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict` for a configuration that was saved as JSON.

    Raises:
        ConfigError: for unknown fields.
    """
    own: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r} in a saved configuration: another version wrote it.")
        if dataclasses.is_dataclass(hints[name]):
            own[name] = from_dict(typing.cast(Any, hints[name]), value)
        else:
            own[name] = tuple(value) if isinstance(value, list) else value
    return cls(**own)
