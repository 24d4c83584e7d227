"""`embed_many`: thousands of images in requests of several, packed lazily and retried as a whole, results in order."""

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

PACK_BYTES = 16 * 2**20  # per request; half of the server's default limit
TOO_MUCH, FAILED = 413, 500

Embedded = Embedding | ImageError | ServerError
"""The result of one image: its embedding, or the error of an image that is rejected or fails the server."""


@dataclass(frozen=True)
class Bulk:
    """The options of `embed_many`.

    Raises:
        ConfigError: for numbers below 1, or a patience that is not above 0.
    """

    policy: Policy  # for single calls
    patience: float  # seconds for which a request is retried
    normalize: bool
    dtype: Dtype
    per_request: int
    in_flight: int

    @property
    def patient(self) -> Policy:
        """The policy of each request: limited by time, not by the number of retries."""
        return dataclasses.replace(self.policy, total=self.patience, retries=None)

    def __post_init__(self) -> None:
        for name in ("per_request", "in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 < self.patience < float("inf"):
            raise ConfigError(f"patience must be a number of seconds above 0, got {self.patience}.")


@dataclass(frozen=True)
class Pack:
    """The images of one request; an error stands for an image that cannot be sent."""

    start: int  # index of the first image
    images: Sequence[bytes | ImageError]


@dataclass
class Packer:
    """Collects images into packs."""

    per_request: int
    start: int = 0
    images: list[bytes | ImageError] = field(default_factory=list)
    size: int = 0

    def add(self, image: bytes | ImageError) -> Iterator[Pack]:
        """Add an image; yields the pack that it completes or no longer fits into."""
        size = 0 if isinstance(image, ImageError) else len(image)
        if self.size + size > PACK_BYTES:
            yield from self.rest()
        self.images.append(image)
        self.size += size
        if len(self.images) == self.per_request:
            yield from self.rest()

    def rest(self) -> Iterator[Pack]:
        """Yield the remaining images, if any."""
        if self.images:
            yield Pack(self.start, self.images)
        self.start, self.images, self.size = self.start + len(self.images), [], 0


def packs(images: Iterable[Image], per_request: int) -> Iterator[Pack]:
    """Pack images lazily."""
    packer = Packer(per_request)
    for image in images:
        yield from packer.add(load(image))
    yield from packer.rest()


def load(image: Image) -> bytes | ImageError:
    """An image as encoded bytes, or the error if it cannot be encoded."""
    try:
        return encoded(image)
    except ImageError as error:
        return error


def embed_pack(pack: Pack, bulk: Bulk) -> Steps[list[Embedded]]:
    """One result per image, in order; `param` of an error is the image's index among all images.

    Raises:
        RefusedError, UnavailableError, ServerError: for failures that the images did not cause.
    """
    embedded = iter((yield from _split([image for image in pack.images if isinstance(image, bytes)], bulk)))
    results = [next(embedded) if isinstance(image, bytes) else image for image in pack.images]
    for index, result in enumerate(results, pack.start):
        if not isinstance(result, Embedding):
            result.param = f"input[{index}]"
    return results


def _split(images: Sequence[bytes], bulk: Bulk) -> Steps[list[Embedded]]:
    """Send all images at once; if they are too large or fail the server, halve them until the culprit is alone."""
    if not images:
        return []
    try:
        return [*(yield from attempts(calls.embed(images, bulk.normalize, bulk.dtype), bulk.patient))]
    except ImageError as error:
        return [error]  # of a single image
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
    """Checks that all results come from one model."""

    required: bool
    fingerprint: str | None = None

    def checked(self, results: Sequence[Embedded]) -> Sequence[Embedded]:
        """Return the results unchanged.

        Raises:
            ModelChangedError: when one comes from another model than the first.
        """
        for result in results:
            if not isinstance(result, Embedding):
                continue
            self.fingerprint = self.fingerprint or result.fingerprint
            if self.required and result.fingerprint != self.fingerprint:
                raise ModelChangedError(
                    f"the engine fingerprint changed from {self.fingerprint} to {result.fingerprint}, and embeddings "
                    "of different models do not compare: start again, or allow it with same_model=False."
                )
        return results
