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
from mixmim_serve.service.problems import RequestError

VARIABLE = "MIXMIM_API_KEYS"  # keys between commas
LOOK_AGAIN = 1.0  # seconds between looks at the file
SHORTEST = 16  # characters of a key

log = logging.getLogger(__name__)


class Keys:
    """The keys that are let in; with none configured everybody is.

    Raises:
        ConfigError: when the file cannot be read, or a key is too short to be a secret.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path) if path else None
        self._of_environment = _digests(os.environ.get(VARIABLE, "").split(","), VARIABLE)
        self._stamp: tuple[int, int, int] | None = None
        self._looked = -float("inf")
        self._of_file: frozenset[bytes] = frozenset()
        if self.path:
            self._read(self.path)

    @property
    def required(self) -> bool:
        """Whether a request needs one: an emptied file lets nobody in."""
        return bool(self.path or self._of_environment)

    def check(self, headers: Headers) -> None:
        """Let a request in that brings a key, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.

        Raises:
            RequestError: 401.
        """
        if not self.required:
            return
        self._look()
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).digest()
        # Every key is compared, in a time that says nothing of which one, or how much of it, was right.
        right = [hmac.compare_digest(digest, known) for known in self._of_environment | self._of_file]
        if not any(right):
            what = "the API key is not known here" if given else "an API key is needed"
            message = f"{what}: send it as Authorization: Bearer KEY."
            raise RequestError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})

    def _look(self) -> None:
        """Take up a changed file; one that cannot be read leaves the keys as they were."""
        if self.path is None or time.monotonic() - self._looked < LOOK_AGAIN:
            return
        try:
            self._read(self.path)
        except ConfigError as error:
            log.error("%s The keys stay as they were.", error)

    def _read(self, path: Path) -> None:
        self._looked = time.monotonic()
        try:
            about = path.stat()
            stamp = (about.st_mtime_ns, about.st_size, about.st_ino)
            if stamp == self._stamp:
                return
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"the API keys in {path} cannot be read ({reason}): one key a line.") from error
        self._of_file = _digests([line for line in lines if not line.lstrip().startswith("#")], str(path))
        self._stamp = stamp


def _digests(keys: list[str], source: str) -> frozenset[bytes]:
    """Only these are kept, so that keys of every length take the same time and none stays in memory."""
    stripped = [key.strip() for key in keys if key.strip()]
    if any(len(key) < SHORTEST for key in stripped):
        raise ConfigError(f"{source} has an API key of fewer than {SHORTEST} characters: use a longer one.")
    return frozenset(hashlib.sha256(key.encode()).digest() for key in stripped)
