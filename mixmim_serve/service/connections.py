"""Open connections, limited in all and per client."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.settings import Settings


@dataclass(frozen=True)
class Place:
    """What a new connection was told."""

    client: str  # what it counts for; empty for a trusted proxy, and where there is no address
    error: RequestError | None = None  # why it is refused
    may_linger: bool = False  # a refused one: until its client has read why


class Connections:
    """Counts open connections and refuses those above the limits.

    A client is an IPv4 address or an IPv6 /64, of which one machine has any number of addresses. Trusted proxies speak
    for many clients: theirs count only in all. As many refused connections as admitted ones may linger.
    """

    def __init__(self, settings: Settings) -> None:
        self.max_total, self.max_per_client = settings.max_connections, settings.max_connections_per_client
        self.proxies = [ipaddress.ip_network(proxy) for proxy in settings.trusted_proxies]
        self.total = self.lingering = 0
        self.by_client: Counter[str] = Counter()

    def enter(self, address: str | None) -> Place:
        """Count a new connection, or refuse it."""
        client = self._client_of(address)
        if error := self._refusal(client):
            may_linger = self.lingering < self.max_total
            self.lingering += may_linger
            return Place(client, error, may_linger)
        self.total += 1
        self.by_client[client] += 1
        return Place(client)

    def leave(self, place: Place) -> None:
        """Forget a connection that has ended."""
        if place.error:
            self.lingering -= place.may_linger
            return
        self.total -= 1
        self.by_client[place.client] -= 1
        if not self.by_client[place.client]:
            del self.by_client[place.client]

    def _client_of(self, address: str | None) -> str:
        try:
            ip = ipaddress.ip_address(address or "")
        except ValueError:
            return ""
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if any(ip in proxy for proxy in self.proxies):
            return ""
        return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))

    def _refusal(self, client: str) -> RequestError | None:
        if self.total >= self.max_total:
            message = f"{self.total} connections are open already: try again in a second."
            return RequestError(503, "too_many_connections", message, headers={"Retry-After": "1"})
        if client and self.by_client[client] >= self.max_per_client:
            message = f"{self.max_per_client} connections from one address are open already: use those again."
            return RequestError(429, "too_many_connections", message, headers={"Retry-After": "1"})
        return None
