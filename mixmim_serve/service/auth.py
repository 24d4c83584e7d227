"""API keys: from a file that may change while the server runs, and from the environment."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from pathlib import Path

from starlette.datastructures import Headers

from mixmim_serve.errors import ConfigError
from mixmim_serve.files import open_regular
from mixmim_serve.service.errors import RequestError

VARIABLE = "MIXMIM_API_KEYS"  # keys between commas
RELOAD_SECONDS = 1.0  # between looks at the file
MIN_LENGTH = 16  # characters of a key
MAX_FILE_BYTES = 1_000_000

log = logging.getLogger(__name__)


class ApiKeys:
    """The keys that authenticate a request; with none configured, every request passes.

    While the file is missing or invalid, no key passes, not even one of the environment: a mistake in the file must not
    leave a revoked key valid.

    Raises:
        ConfigError: when the file cannot be read, or a key is too short to be a secret.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path) if path else None
        self._from_environment = _digests(os.environ.get(VARIABLE, "").split(","), VARIABLE)
        self._from_file: frozenset[bytes] = frozenset()
        self._stamp: tuple[int, ...] = ()  # of the file that was read
        self.problem = ""  # why no key passes at present
        self._checked = -float("inf")
        if self.path:
            self._read(self.path)

    @property
    def required(self) -> bool:
        """Whether a request needs a key; an empty file lets nobody in."""
        return bool(self.path or self._from_environment)

    def check(self, headers: Headers) -> str | None:
        """Accept a request that carries a key, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.

        Returns:
            A name of the key that does not reveal it; None where no key is required.

        Raises:
            RequestError: 401.
        """
        if not self.required:
            return None
        self.reload()
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).digest()
        # Every key is compared, so that the time says nothing of which one, or how much of it, was right.
        matches = [hmac.compare_digest(digest, key) for key in self._from_environment | self._from_file]
        if self.problem or not any(matches):
            reason = "unknown API key" if given else "an API key is needed"
            message = f"{reason}: send a valid one as Authorization: Bearer KEY."
            raise RequestError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return f"key {digest.hex()}"

    def reload(self) -> None:
        """Read the file if it has changed; one that cannot be read or is invalid closes the door, see `problem`."""
        if self.path is None or time.monotonic() - self._checked < RELOAD_SECONDS:
            return
        try:
            self._read(self.path)
            problem = ""
        except ConfigError as error:
            problem = str(error)
        if problem != self.problem:
            log.error("%s No key is accepted until then.", problem) if problem else log.info("API keys work again.")
        self.problem = problem

    def _read(self, path: Path) -> None:
        self._checked = time.monotonic()
        try:
            with open_regular(path) as file:
                stat = os.fstat(file.fileno())
                stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                if stamp == self._stamp:
                    return
                self._stamp, self._from_file = (), frozenset()
                text = file.read(MAX_FILE_BYTES + 1)
            if len(text) > MAX_FILE_BYTES:
                raise ConfigError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: write one API key per line.")
            lines = text.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._stamp, self._from_file = (), frozenset()
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"cannot read the API keys in {path} ({reason}): write one key per line.") from error
        self._from_file = _digests([line for line in lines if not line.lstrip().startswith("#")], str(path))
        self._stamp = stamp


def _digests(keys: list[str], source: str) -> frozenset[bytes]:
    """SHA-256 of each key: comparisons take the same time for every length, and no key stays in memory."""
    stripped = [key.strip() for key in keys if key.strip()]
    if any(len(key) < MIN_LENGTH for key in stripped):
        raise ConfigError(f"{source} has an API key of fewer than {MIN_LENGTH} characters: use a longer one.")
    return frozenset(hashlib.sha256(key.encode()).digest() for key in stripped)
