"""How a server behaves: limits, time, who may come in. Every value has a default that suits one machine."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixmim_serve.config import unknown
from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ConfigError

LONGEST_DEADLINE = 3600.0  # seconds that X-Request-Timeout may ask for
VARIABLE = "MIXMIM_SERVICE"  # the settings as JSON, for servers that `mixmim serve` does not start


@dataclass(frozen=True)
class Settings:
    """What `mixmim serve --set KEY=VALUE` can change."""

    max_body_bytes: int = 32 * 2**20  # of one request; streams have none
    max_image_bytes: int = 20_000_000
    max_pixels: int = 64_000_000  # by an image's header, before it is decoded
    max_items: int = 64  # images in one request
    max_waiting: int = 512  # images inside at once, from the first byte of a request to its answer; above it 429
    max_held_bytes: int = 512 * 2**20  # of request bodies and large answers in memory at once; above it 429
    max_batch: int = 32  # images in one call of the engine
    decode_threads: int = 0  # 0: as many as cores
    body_seconds: float = 30.0  # for a body to arrive, and for each piece of a stream; then 408
    header_seconds: float = 10.0  # for a connection to send its first request's headers; then it is closed
    request_seconds: float = 60.0  # until an answer must be ready, unless X-Request-Timeout says so; then 504
    grace_seconds: float = 30.0  # for what is in flight after SIGTERM
    stream_window: int = 64  # images of one stream inside at once
    api_keys: str = ""  # a file with one key a line; MIXMIM_API_KEYS in the environment holds others
    cors: tuple[str, ...] = ()  # origins whose pages may call this server; "*" is any
    log_format: str = "text"  # or json
    jobs_roots: tuple[str, ...] = ()  # folders and URLs that jobs may read; without any there are no jobs
    jobs_dir: str = ""  # the list of jobs and their results; ~/.local/share/mixmim-serve/jobs
    jobs_waiting: int = 100  # jobs that wait; above it 429

    def __post_init__(self) -> None:
        for name in ("cors", "jobs_roots"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError(f"{field.name} must be like {field.default!r}, got {value!r}.")
            lowest = 0 if field.name == "decode_threads" else 1
            if isinstance(value, int) and value < lowest:
                raise ConfigError(f"{field.name} must be {lowest} or more, got {value}.")
            if isinstance(value, float) and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name} must be a number of seconds above 0, got {value}.")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be text or json, got {self.log_format!r}.")

    def to_json(self) -> str:
        """For `VARIABLE`."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def decoders(self) -> int:
        """Threads that decode."""
        return self.decode_threads or usable_cores()


def from_environment() -> Settings:
    """Those that `VARIABLE` holds.

    Raises:
        ConfigError: for values that cannot be used.
    """
    try:
        values = json.loads(os.environ.get(VARIABLE) or "{}")
        known = {field.name for field in dataclasses.fields(Settings)}
        for name in values:
            if name not in known:
                raise unknown("setting", name, known)
        return Settings(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{VARIABLE} is no JSON object of settings: {error}.") from error


def from_assignments(assignments: Iterable[str], **values: Any) -> Settings:
    """Settings from `KEY=VALUE`, on top of `values`.

    Raises:
        ConfigError: for an unknown key, with its nearest neighbours, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings) if field.name not in values}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment} sets nothing: write KEY=VALUE, such as max_batch=16.")
        if name not in fields:
            raise unknown("setting", name, fields)
        values[name] = _parse(name, text, type(fields[name].default))
    return Settings(**values)


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        return tuple(filter(None, text.split(","))) if kind is tuple else kind(text)
    except ValueError as error:
        kinds = {int: "a whole number", float: "a number"}
        raise ConfigError(f"{name} must be {kinds[kind]}, got {text!r}.") from error
