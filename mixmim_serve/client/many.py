"""Thousands of images as requests of several: packed lazily, each request tried again as a whole, results in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mixmim_serve.client import calls
from mixmim_serve.client.calls import Dtype
from mixmim_serve.client.images import Image, encoded
from mixmim_serve.client.results import Embedding
from mixmim_serve.client.retry import Policy, Steps, attempts
from mixmim_serve.errors import ConfigError, ImageError, ModelChangedError, ServerError

PACK_BYTES = 16 * 2**20  # in one request; half of what the server takes by default
TOO_MUCH, FAILED = 413, 500

Embedded = Embedding | ImageError | ServerError
"""What becomes of one image: the error of one that is refused, or on which the server fails, stands in its place."""


@dataclass(frozen=True)
class Bulk:
    """The options of `embed_many`.

    Raises:
        ConfigError: for numbers below 1, or a patience of no seconds.
    """

    policy: Policy  # of single calls
    patience: float  # seconds for which a request is tried again
    normalize: bool
    dtype: Dtype
    per_request: int
    in_flight: int

    @property
    def patient(self) -> Policy:
        """The policy of each request: only time ends it."""
        return dataclasses.replace(self.policy, total=self.patience, retries=None)

    def __post_init__(self) -> None:
        for name in ("per_request", "in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 < self.patience < float("inf"):
            raise ConfigError(f"patience must be a number of seconds above 0, got {self.patience}.")


@dataclass(frozen=True)
class Pack:
    """The images of one request, or why one of them cannot be sent."""

    start: int  # index of the first one
    images: Sequence[bytes | ImageError]


@dataclass
class Packer:
    """Collects images until they are enough for a request."""

    per_request: int
    start: int = 0
    images: list[bytes | ImageError] = field(default_factory=list)
    size: int = 0

    def add(self, image: bytes | ImageError) -> Iterator[Pack]:
        """A pack, where this image fills it or no longer fits into it."""
        size = 0 if isinstance(image, ImageError) else len(image)
        if self.size + size > PACK_BYTES:
            yield from self.rest()
        self.images.append(image)
        self.size += size
        if len(self.images) == self.per_request:
            yield from self.rest()

    def rest(self) -> Iterator[Pack]:
        """What is left."""
        if self.images:
            yield Pack(self.start, self.images)
        self.start, self.images, self.size = self.start + len(self.images), [], 0


def packs(images: Iterable[Image], per_request: int) -> Iterator[Pack]:
    """Requests, made as they are asked for."""
    packer = Packer(per_request)
    for image in images:
        yield from packer.add(load(image))
    yield from packer.rest()


def load(image: Image) -> bytes | ImageError:
    """An image as bytes, or why not."""
    try:
        return encoded(image)
    except ImageError as error:
        return error


def embedded(pack: Pack, bulk: Bulk) -> Steps[list[Embedded]]:
    """One result an image, in order; errors name the image by its place among all.

    Raises:
        RefusedError, UnavailableError, ServerError: when nothing was wrong with the images.
    """
    found = iter((yield from _split([image for image in pack.images if isinstance(image, bytes)], bulk)))
    results = [next(found) if isinstance(image, bytes) else image for image in pack.images]
    for index, result in enumerate(results, pack.start):
        if not isinstance(result, Embedding):
            result.param = f"input[{index}]"
    return results


def _split(images: Sequence[bytes], bulk: Bulk) -> Steps[list[Embedded]]:
    """Ask for all at once; where that is too much, or the server fails on it, halve until the culprit is alone."""
    if not images:
        return []
    try:
        return [*(yield from attempts(calls.embed(images, bulk.normalize, bulk.dtype), bulk.patient))]
    except ImageError as error:
        return [error]  # of an image that came alone
    except ServerError as error:
        if error.status not in (TOO_MUCH, FAILED):
            raise
        if len(images) == 1:
            return [error]
    half = len(images) // 2
    first = yield from _split(images[:half], bulk)
    return first + (yield from _split(images[half:], bulk))


@dataclass
class OneModel:
    """Looks at results as they come."""

    required: bool
    fingerprint: str | None = None

    def checked(self, results: Sequence[Embedded]) -> Sequence[Embedded]:
        """The same results.

        Raises:
            ModelChangedError: when one is of another model than the first.
        """
        for result in results:
            if not isinstance(result, Embedding):
                continue
            self.fingerprint = self.fingerprint or result.fingerprint
            if self.required and result.fingerprint != self.fingerprint:
                raise ModelChangedError(
                    f"the fingerprint changed from {self.fingerprint} to {result.fingerprint} on the way, and such "
                    "vectors do not compare: start again, or allow it with same_model=False."
                )
        return results
