"""The server's address, API key and policy, and how requests to it are built."""

from __future__ import annotations

from typing import Any

import httpx

from mixmim_serve.client.answers import Reply
from mixmim_serve.client.retry import ConnectionRefused, Outcome, Policy, Send
from mixmim_serve.errors import ConfigError
from mixmim_serve.version import __version__


class Target:
    """One server.

    Raises:
        ConfigError: for an invalid URL or API key.
    """

    def __init__(self, url: str, api_key: str | None, policy: Policy | None) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is not a URL ({error}): use one such as http://127.0.0.1:3000.") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ConfigError(f"{url!r} is not the URL of a server: use one such as http://127.0.0.1:3000.")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ConfigError("the API key must be printable ASCII: check it for line breaks and spaces.")
        self.url = url.rstrip("/")
        self.policy = policy or Policy()
        self.was_reached = False  # whether the server has ever answered this client
        self.headers = {"User-Agent": f"mixmim-serve/{__version__}"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def request(self, send: Send) -> dict[str, Any]:
        """The arguments for httpx's `build_request`."""
        call = send.call
        return {
            "method": call.method or ("POST" if call.images else "GET"),
            "url": self.url + call.path,
            "params": call.params,
            "json": call.body,
            "files": [("image", ("image", image, "application/octet-stream")) for image in call.images] or None,
            "headers": {**self.headers, **send.headers},
            "timeout": send.timeout,
        }

    def outcome(self, found: Reply | httpx.RequestError) -> Outcome:
        """What `attempts` is told: the response or error itself, or that nothing listens at the address."""
        self.was_reached = self.was_reached or isinstance(found, Reply)
        if isinstance(found, httpx.ConnectError) and _is_refused(found):
            return ConnectionRefused(self.url, was_reached=self.was_reached)
        return found


def _is_refused(error: BaseException | None) -> bool:
    """Whether the operating system refused the connection, at every address of the host; httpx wraps its errors."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_refused(each) for each in error.exceptions)
    if error is None or isinstance(error, ConnectionRefusedError):
        return error is not None
    return _is_refused(error.__cause__ or error.__context__)
