"""`FetchSettings`: how web servers are asked for images. This module needs only the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip2_actor.inputs.field_types import require_types


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """How images are fetched from web servers."""

    fetch_timeout_s: float = 30.0
    """Maximum seconds for one try to fetch an image, redirects included."""
    fetch_patience_s: float = 60.0
    """Seconds for which a fetch is tried again when the server is busy (429), fails (5xx) or does not answer;
    0 tries once."""
    fetch_per_host: int = 8
    """Maximum number of images that one decoding actor fetches from a host at the same time."""
    allow_private_hosts: tuple[str, ...] = ()
    """Hosts that may be asked for images although their addresses are private, such as images.internal.
    Others are asked only if their addresses are public."""

    def __post_init__(self) -> None:
        require_types(self)
        if not 0 < self.fetch_timeout_s < math.inf:
            raise ValueError(f"fetch_timeout_s must be above 0 and finite, got {self.fetch_timeout_s}")
        if not self.fetch_patience_s >= 0:
            raise ValueError(f"fetch_patience_s must be at least 0, got {self.fetch_patience_s}")
        if self.fetch_per_host < 1:
            raise ValueError(f"fetch_per_host must be at least 1, got {self.fetch_per_host}")
        for host in self.allow_private_hosts:
            if not host or set(host) & set("/@?#* "):
                raise ValueError(
                    f"allow_private_hosts must name hosts without scheme and path, got {host!r}; write it as "
                    "images.internal or 10.0.0.7"
                )
