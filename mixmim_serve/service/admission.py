"""Who may come in: room for images and for bytes, refused before a body is read when there is none."""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType

from mixmim_serve.service.problems import RequestError

HORIZON = 10.0  # seconds over which the drain rate is measured
LONGEST = 60  # seconds that a client is told to wait at most


class Admission:
    """Counts what is inside. One event loop uses it, so nothing is locked."""

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images = 0
        self.bytes = 0
        self._left: deque[tuple[float, int]] = deque()  # when, and with how many images

    def enter(self, images: int = 1) -> Ticket:
        """Take places; the ticket gives them back.

        Raises:
            RequestError: 429, when there is no room.
        """
        ticket = Ticket(self)
        ticket.more(images)
        return ticket

    def full(self, what: str) -> RequestError:
        """The refusal, with the time after which there should be room."""
        wait = self.retry_after()
        headers = {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(wait * 1e3))}
        return RequestError(429, "queue_full", f"{what}: try again in {math.ceil(wait)} s.", headers=headers)

    def retry_after(self) -> float:
        """Seconds until half of what is inside should have left, at the rate of the last seconds."""
        rate = self.drain_rate()
        return min(max(self.images / 2 / rate, 0.1), LONGEST) if rate else 1.0

    def drain_rate(self) -> float:
        """Images that left a second."""
        now = time.monotonic()
        while self._left and self._left[0][0] < now - HORIZON:
            self._left.popleft()
        if not self._left:
            return 0.0
        return sum(images for _, images in self._left) / max(now - self._left[0][0], 0.1)

    def leave(self, images: int, held: int) -> None:
        """Of one ticket."""
        self.images -= images
        self.bytes -= held
        self._left.append((time.monotonic(), images))
        if len(self._left) > 4096:  # a rate of seconds does not need more
            self._left.popleft()


class Ticket:
    """The places of one request."""

    def __init__(self, admission: Admission) -> None:
        self.admission, self.images, self.bytes = admission, 0, 0

    def more(self, images: int) -> None:
        """Take places for so many more images.

        Raises:
            RequestError: 429.
        """
        if self.admission.images + images > self.admission.max_images:
            others = self.admission.images - self.images
            raise self.admission.full(f"{others} images are waiting already")
        self.admission.images += images
        self.images += images

    def reserve(self, images: int) -> None:
        """Have places for so many images in all.

        Raises:
            RequestError: 429.
        """
        self.more(images - self.images)

    def hold(self, count: int) -> None:
        """Keep so many more bytes in memory until the request has left.

        Raises:
            RequestError: 429.
        """
        if self.admission.bytes + count > self.admission.max_bytes:
            raise self.admission.full("requests in progress fill the memory that is set aside for them")
        self.admission.bytes += count
        self.bytes += count

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.admission.leave(self.images, self.bytes)
