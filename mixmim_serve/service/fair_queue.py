"""A queue that is fair between clients, and between the requests of a client."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Flow(Generic[Item]):
    """The waiting items of one request, each with its cost, and the cost that the request was served already."""

    served: float
    items: deque[tuple[Item, float]] = field(default_factory=deque)


@dataclass
class _Client(Generic[Item]):
    """The requests of one client that have waiting items, and the cost that the client was served already."""

    served: float
    flows: dict[str, _Flow[Item]] = field(default_factory=dict)


class FairQueue(Generic[Item]):
    """Each pop serves the client that was served least, and of it the request that was served least.

    A new client or request starts level with the one that was served least, so that waiting longer gives no claim.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Client[Item]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def clients(self) -> Collection[str]:
        """The clients that have waiting items."""
        return self._clients.keys()

    def push(self, client: str, request: str, item: Item, cost: float = 1.0) -> None:
        """Add an item of a client's request."""
        owner = self._clients.get(client)
        if owner is None:
            least = min((other.served for other in self._clients.values()), default=0.0)
            owner = self._clients[client] = _Client(least)
        flow = owner.flows.get(request)
        if flow is None:
            least = min((other.served for other in owner.flows.values()), default=0.0)
            flow = owner.flows[request] = _Flow(least)
        flow.items.append((item, cost))
        self._length += 1

    def next_client(self) -> str | None:
        """The client that the next pop serves; None when nothing waits."""
        return min(self._clients, key=lambda client: self._clients[client].served, default=None)

    def pop(self) -> Item | None:
        """The next item; None when none waits."""
        client = self.next_client()
        if client is None:
            return None
        owner = self._clients[client]
        request, flow = min(owner.flows.items(), key=lambda entry: entry[1].served)
        item, cost = flow.items.popleft()
        self._length -= 1
        owner.served += cost
        flow.served += cost
        if not flow.items:
            del owner.flows[request]
        if not owner.flows:
            del self._clients[client]
        return item
