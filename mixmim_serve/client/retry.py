"""Retries: a generator that yields what to do next and receives the outcome.

It neither sends nor waits, so that both clients, and tests with their own clock, run the same code.
"""

from __future__ import annotations

import dataclasses
import email.utils
import itertools
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from mixmim_serve.client.answers import Reply, error_of, is_result, read_as
from mixmim_serve.client.calls import READY, Call
from mixmim_serve.errors import ConfigError, UnavailableError

RETRIED = frozenset({408, 429, 502, 503, 504})  # statuses that do not reject the request itself
LONGEST_DEADLINE = 3600.0  # seconds that the server accepts as X-Request-Timeout
SHORTEST = 0.001  # seconds; with less time left no request is sent


@dataclass(frozen=True)
class Policy:
    """Timeouts, in seconds, and retries of a client.

    Raises:
        ConfigError: for invalid values.
    """

    connect: float = 5.0  # to establish a connection
    read: float = 30.0  # without a byte of the response; also sent to the server, which drops expired requests
    total: float = 120.0  # for one call with all its retries
    retries: int | None = 8  # after the first attempt; None: until `total` is over
    first_wait: float = 0.2  # before the first retry; doubled for each further one, minus a random part of up to half
    longest_wait: float = 5.0  # between two attempts, unless the server asks for more

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total", "first_wait", "longest_wait"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}.")
        if self.retries is not None and self.retries < 0:
            raise ConfigError(f"retries must be 0 or more, or None, got {self.retries}.")

    def wait(self, tries: int, outcome: Outcome) -> float:
        """Seconds to wait after `tries` attempts: what the server asks for, plus jitter, or exponential backoff."""
        requested = retry_after(outcome.headers) if isinstance(outcome, Reply) else None
        if requested is not None:
            return requested * random.uniform(1, 1.25)  # noqa: S311 - no secret
        longest = min(self.first_wait * 2.0 ** min(tries - 1, 60), self.longest_wait)
        return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret


@dataclass(frozen=True)
class Send:
    """Step: send this request; the outcome is the reply or the error."""

    call: Call[Any]
    headers: Mapping[str, str]
    timeout: httpx.Timeout
    seconds: float  # total time for the response


@dataclass(frozen=True)
class Wait:
    """Step: wait."""

    seconds: float


class ConnectionRefused(httpx.ConnectError):
    """Nothing listens at the server's address: it was not started, still loads its model, or restarts."""

    def __init__(self, url: str, *, was_reached: bool) -> None:
        super().__init__(f"connection refused by {url}")
        self.was_reached = was_reached  # whether the server has answered this client before


Outcome = Reply | httpx.RequestError
Value = TypeVar("Value")
Steps = Generator[Send | Wait, Outcome | None, Value]


def attempts(call: Call[Value], policy: Policy, clock: Callable[[], float] = time.monotonic) -> Steps[Value]:
    """Send a call until there is a final response, with one X-Request-Id for all attempts.

    A refused connection is final too, unless the server has answered before and may be restarting.

    Raises:
        ImageError: when the image is rejected.
        RefusedError: when the request is wrong.
        ServerError: when the server fails, or its response cannot be read.
        UnavailableError: when time or retries run out, or nothing listens.
    """
    request, began = uuid.uuid4().hex, clock()
    end = began + policy.total
    outcome: Outcome | None = None
    for tries in itertools.count(1):
        left = end - clock()
        if left < SHORTEST:
            raise _given_up(call, tries - 1, clock() - began, outcome, request)
        outcome = yield _send(call, policy, left, request)
        if isinstance(outcome, Reply) and outcome.status not in RETRIED:
            if is_result(outcome):
                return read_as(call.read, outcome)
            raise error_of(outcome, len(call.images), request)
        assert outcome is not None  # noqa: S101 - a `Send` is answered
        wait = policy.wait(tries, outcome)
        is_over = (policy.retries is not None and tries > policy.retries) or clock() + wait > end
        if is_over or (isinstance(outcome, ConnectionRefused) and not outcome.was_reached):
            raise _given_up(call, tries, clock() - began, outcome, request)
        yield Wait(wait)
    raise AssertionError  # `count` never ends


def is_ready(policy: Policy) -> Steps[bool]:
    """Check the readiness probe once.

    Raises:
        ServerError: when the response is not from mixmim-serve.
    """
    try:
        return (yield from attempts(READY, dataclasses.replace(policy, retries=0)))
    except UnavailableError:
        return False


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `Retry-After-Ms`, or `Retry-After` as seconds or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None


def _send(call: Call[Any], policy: Policy, left: float, request: str) -> Send:
    read = min(policy.read, left)
    headers = {
        "Accept": call.accept,
        "X-Request-Id": request,
        "X-Request-Timeout": f"{min(read, LONGEST_DEADLINE):.3f}",
        **call.headers,
    }
    timeout = httpx.Timeout(connect=min(policy.connect, left), read=read, write=read, pool=left)
    return Send(call, headers, timeout, left)


def _given_up(call: Call[Any], tries: int, waited: float, last: Outcome | None, request: str) -> UnavailableError:
    what = f"{call.path} failed after {tries} {'attempt' if tries == 1 else 'attempts'} in {waited:.1f} s"
    if isinstance(last, Reply):
        return UnavailableError(
            f"{what}; the last response was {last.status}: {last.reason}",
            last.status,
            last.problem.get("code"),
            request=request,
        )
    if isinstance(last, ConnectionRefused):
        return UnavailableError(
            f"{what}, {last}: start the server with `mixmim serve` and wait until it is ready, or check the URL.",
            request=request,
        )
    reason = "there was no time to send it" if last is None else str(last) or type(last).__name__
    return UnavailableError(
        f"{what} ({reason}): check that the server is running, or allow more time.", request=request
    )
