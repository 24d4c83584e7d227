"""How often and how long a call is tried: a generator that says what to do next and is told what came of it.

It neither sends nor waits, so that both clients, and a test with a clock of its own, drive the same code.
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

AGAIN = frozenset({408, 429, 502, 503, 504})  # statuses that say nothing against the request
LONGEST_DEADLINE = 3600.0  # seconds that the server takes as X-Request-Timeout
SHORTEST = 0.001  # seconds below which there is no use in sending


@dataclass(frozen=True)
class Policy:
    """How patient a client is, in seconds.

    Raises:
        ConfigError: for values that cannot work.
    """

    connect: float = 5.0  # until a connection stands
    read: float = 30.0  # without a byte of the answer; the server is told, and drops what nobody waits for
    total: float = 120.0  # for one call with all its tries
    retries: int | None = 8  # after the first try; None: until `total` is over
    first_wait: float = 0.2  # before the first retry; doubled for each one more, less up to half of it by chance
    longest_wait: float = 5.0  # between two tries, unless the server asks for more

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total", "first_wait", "longest_wait"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}.")
        if self.retries is not None and self.retries < 0:
            raise ConfigError(f"retries must be 0 or more, or None, got {self.retries}.")

    def wait(self, tries: int, outcome: Outcome) -> float:
        """Seconds after so many tries: what the server asks for and a little more, so that not all come at once."""
        asked = retry_after(outcome.headers) if isinstance(outcome, Reply) else None
        if asked is not None:
            return asked * random.uniform(1, 1.25)  # noqa: S311 - no secret
        return min(self.first_wait * 2.0 ** min(tries - 1, 60), self.longest_wait) * random.uniform(0.5, 1)  # noqa: S311


@dataclass(frozen=True)
class Send:
    """Do this, and answer with the reply or the error."""

    call: Call[Any]
    headers: Mapping[str, str]
    timeout: httpx.Timeout
    seconds: float  # after which to give up, whatever arrives meanwhile


@dataclass(frozen=True)
class Wait:
    """Do nothing for so long."""

    seconds: float


Outcome = Reply | httpx.RequestError
Made = TypeVar("Made")
Steps = Generator[Send | Wait, Outcome | None, Made]


def attempts(call: Call[Made], policy: Policy, clock: Callable[[], float] = time.monotonic) -> Steps[Made]:
    """Try until there is an answer, with one X-Request-Id for all tries.

    Raises:
        ImageError: when the image is refused.
        RefusedError: when the request is wrong.
        ServerError: when the server failed, or its answer cannot be read.
        UnavailableError: when time or tries are used up.
    """
    request, end = uuid.uuid4().hex, clock() + policy.total
    outcome: Outcome | None = None
    for tries in itertools.count(1):
        left = end - clock()
        if left < SHORTEST:
            raise _given_up(call, tries - 1, policy, outcome, request)
        outcome = yield _send(call, policy, left, request)
        if isinstance(outcome, Reply) and outcome.status not in AGAIN:
            if is_result(outcome):
                return read_as(call.read, outcome)
            raise error_of(outcome, len(call.images), request)
        assert outcome is not None  # noqa: S101 - a `Send` is answered
        wait = policy.wait(tries, outcome)
        if (policy.retries is not None and tries > policy.retries) or clock() + wait > end:
            raise _given_up(call, tries, policy, outcome, request)
        yield Wait(wait)
    raise AssertionError  # `count` has no end


def is_ready(policy: Policy) -> Steps[bool]:
    """One look at the probe.

    Raises:
        ServerError: when something answers that is no server of ours.
    """
    try:
        return (yield from attempts(READY, dataclasses.replace(policy, retries=0)))
    except UnavailableError:
        return False


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After-Ms`, or `Retry-After` as seconds or a date."""
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


def _given_up(call: Call[Any], tries: int, policy: Policy, last: Outcome | None, request: str) -> UnavailableError:
    what = f"{call.path} was not answered in {tries} {'try' if tries == 1 else 'tries'} within {policy.total:g} s"
    if isinstance(last, Reply):
        return UnavailableError(
            f"{what}; the last answer was {last.status}: {last.reason}",
            last.status,
            last.problem.get("code"),
            request=request,
        )
    reason = "there was no time to send it" if last is None else str(last) or type(last).__name__
    return UnavailableError(f"{what} ({reason}): see whether the server runs, or wait longer.", request=request)
