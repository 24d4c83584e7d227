"""Settings of a server: limits, timeouts, access. Every value has a default that suits one machine."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixmim_serve.anomaly.rates import check_rate
from mixmim_serve.cores import usable_cores
from mixmim_serve.errors import ConfigError
from mixmim_serve.settings import parse_assignments, unknown_setting

MAX_REQUEST_TIMEOUT = 3600.0  # seconds that X-Request-Timeout may ask for
VARIABLE = "MIXMIM_SERVICE"  # the settings as JSON, for servers that `mixmim serve` does not start


@dataclass(frozen=True)
class Settings:
    """The values that `mixmim serve --set KEY=VALUE` can change."""

    max_body_bytes: int = 32 * 2**20  # per request; streams have no limit
    max_image_bytes: int = 20_000_000
    max_pixels: int = 64_000_000  # per image, by its header, before it is decoded
    max_items: int = 64  # images in one request
    max_client_waiting: int = 256  # images of one client inside at once: by its API key, else its address
    max_waiting: int = 512  # images inside at once, from the end of their upload to their answer; above that 429
    max_held_bytes: int = 512 * 2**20  # of request bodies and large answers in memory at once; above that 429
    max_batch: int = 32  # images in one call of the engine
    decode_threads: int = 0  # 0: one per usable core
    body_seconds: float = 30.0  # for a body to arrive, and for each piece of a stream; then 408
    header_seconds: float = 10.0  # for the headers of each request; then 408
    send_seconds: float = 20.0  # for a client to read each 256 KiB of an answer; then it is disconnected
    request_seconds: float = 60.0  # until the answer must be ready, unless X-Request-Timeout is set; then 504
    grace_seconds: float = 30.0  # for requests in flight after SIGTERM
    max_request_seconds: float = 600.0  # at most, whatever X-Request-Timeout asks for
    max_request_megapixels: int = 512  # decode cost of the images of one request; streams have no limit
    max_client_megapixels: int = 1024  # decode cost of the images of one client that wait to be decoded
    decode_seconds: float = 10.0  # of CPU time for one large image; small ones need less than 0.1 s
    decode_bytes: int = 2**30  # of memory for one large image
    stream_window: int = 64  # images of one stream inside at once
    stream_idle_seconds: float = 60.0  # of a stream without a complete image; then it is closed
    false_alarm_rate: float = 0.0  # share of normal images that POST /anomaly calls abnormal; 0: as calibrated
    max_request_line: int = 8192  # bytes; above that 414
    max_header_bytes: int = 65_536  # of one request; above that 431. Limits the framing of chunked bodies too
    max_headers: int = 100  # of one request; above that 431
    max_connections: int = 1024  # open at once; above that 503
    max_connections_per_client: int = 256  # per IPv4 address or IPv6 /64; above that 429
    trusted_proxies: tuple[str, ...] = ()  # addresses or networks: their X-Forwarded-For names the client
    api_keys: str = ""  # a file with one key per line; MIXMIM_API_KEYS in the environment may hold more
    cors: tuple[str, ...] = ()  # origins whose pages may call this server; "*" means any
    log_format: str = "text"  # or json
    jobs_roots: tuple[str, ...] = ()  # folders and URLs that jobs may read; jobs are off without any
    jobs_dir: str = ""  # of the list of jobs and their results; default ~/.local/share/mixmim-serve/jobs
    jobs_waiting: int = 100  # jobs in the queue; above that 429

    def __post_init__(self) -> None:
        for name in ("cors", "jobs_roots", "trusted_proxies"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError(f"{field.name} must be like {field.default!r}, got {value!r}.")
            lowest = 0 if field.name in ("decode_threads", "false_alarm_rate") else 1
            if isinstance(value, int) and value < lowest:
                raise ConfigError(f"{field.name} must be {lowest} or more, got {value}.")
            if isinstance(value, float) and field.name != "false_alarm_rate" and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name} must be a number of seconds above 0, got {value}.")
        if self.false_alarm_rate:
            check_rate(self.false_alarm_rate)
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be text or json, got {self.log_format!r}.")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                message = f"trusted_proxies must be addresses or networks such as 10.0.0.0/8, got {proxy!r}."
                raise ConfigError(message) from error

    def to_json(self) -> str:
        """The settings as JSON, to be set as `VARIABLE`."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def decoders(self) -> int:
        """Number of threads that decode images."""
        return self.decode_threads or usable_cores()


def from_environment() -> Settings:
    """The settings in `VARIABLE`, or the defaults.

    Raises:
        ConfigError: for values that cannot be used.
    """
    try:
        values = json.loads(os.environ.get(VARIABLE) or "{}")
        names = {field.name for field in dataclasses.fields(Settings)}
        for name in values:
            if name not in names:
                raise unknown_setting(name, names)
        return Settings(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{VARIABLE} is not a JSON object of settings: {error}.") from error


def from_assignments(assignments: Iterable[str], **values: Any) -> Settings:
    """Settings from `KEY=VALUE`, on top of `values`.

    Raises:
        ConfigError: for an unknown key, with its nearest neighbours, or a value of another type.
    """
    return Settings(**values, **parse_assignments(Settings, assignments, exclude=values))
