"""What may be fetched from URLs that others chose, and what goes wrong: `FetchPolicy` and `FetchError`."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from typing import Literal

from blip2_actor.inputs.addresses import Address, is_public, plain_host
from blip2_actor.inputs.field_types import require_types
from blip2_actor.status import Status

FetchReason = Literal["url", "host", "address", "redirects", "answer", "size", "time", "connection"]
"""`url`: it is not a plain http or https URL. `host`, `address`: the policy does not allow it. `redirects`:
there are too many. `answer`: not status 200, or a compressed body. `size`, `time`: more than the policy
allows. `connection`: the server cannot be reached, or does not speak HTTP."""

_STATUSES: dict[FetchReason, Status] = {
    "url": Status.REFUSED,
    "host": Status.REFUSED,
    "address": Status.REFUSED,
    "size": Status.TOO_LARGE,
}
_TRANSIENT_ANSWERS = (408, 425, 429, 500, 502, 503, 504)
"""Statuses with which a server says that the same request may succeed later."""


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What may be fetched, and what one image may cost.

    Examples:
        >>> FetchPolicy(hosts=("images.example.com",), max_bytes=20 << 20).timeout_s
        30.0
    """

    hosts: tuple[str, ...] | None = None
    """Fetch only from these host names; by default, from every host with a public address."""
    allow_networks: tuple[str, ...] = ()
    """Networks that may be reached although they are not public, such as 10.0.0.0/8."""
    private_hosts: tuple[str, ...] = ()
    """Hosts that may be reached at any address, such as images.internal. A redirect must lead to one of them,
    or to a public address."""
    max_bytes: int = 128 << 20
    """Maximum number of bytes of one image."""
    timeout_s: float = 30.0
    """Maximum seconds for one image, redirects included; the resolver has a limit of its own."""
    max_redirects: int = 5
    """Maximum number of redirects."""

    def __post_init__(self) -> None:
        require_types(self)
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(map(plain_host, self.hosts)))
        object.__setattr__(self, "private_hosts", tuple(map(plain_host, self.private_hosts)))
        for network in self.allow_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(
                    f"allow_networks must be networks such as 10.0.0.0/8, got {network!r}: {error}"
                ) from error
        for name in ("max_bytes", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects must be at least 0, got {self.max_redirects}")

    def allows(self, address: Address) -> bool:
        """Return True if a connection to this address is allowed."""
        networks = map(ipaddress.ip_network, self.allow_networks)
        return is_public(address) or any(address in network for network in networks)


class FetchError(Exception):
    """An image was not fetched; `reason` and `status` say which kind of problem, the message says why."""

    def __init__(
        self,
        reason: FetchReason,
        message: str,
        http_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Keep what a caller needs to decide about another try.

        Args:
            http_status: the status of the server's answer, if it has answered.
            retry_after_s: how many seconds the server wants the client to wait.
        """
        super().__init__(message)
        self.reason = reason
        self.status = _STATUSES.get(reason, Status.FETCH_FAILED)
        self.http_status = http_status
        self.retry_after_s = retry_after_s

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.reason in ("connection", "time") or self.http_status in _TRANSIENT_ANSWERS
