"""What the endpoint is built from: one frozen value, which is the `args` of a Serve config and the flags of
`blip2 serve`.

Nothing here imports pydantic, Ray or torch, so that `blip2 serve --help` is fast; `deploy.app` has pydantic
check the `args`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from blip2_actor import EngineConfig, GenerationOptions, ImageLimits
from blip2_actor.flags import hiding, prefixed

MAX_IN_FLIGHT = 1000
"""Half of what Serve itself queues for a gateway, so that the gateway refuses requests first, in JSON."""


@dataclass(frozen=True, kw_only=True)
class OnlineImageLimits(ImageLimits):
    """Limits for one image; tighter than in a batch job, because somebody waits for the answer."""

    max_file_bytes: int = 20 << 20
    cpu_s: float = 10.0
    wall_s: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accept_truncated:
            raise ValueError("accept_truncated must be false, as an answer has no flags; send a whole image")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the limits of the service. Replicas and devices are Serve's own `deployments`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    engine: EngineConfig = field(default=EngineConfig())
    """model and device"""
    options: GenerationOptions = field(default=GenerationOptions())
    """generation, if a request does not say otherwise"""
    timeout_s: float = 60.0
    """Seconds from the first byte of a request to its caption; after that the answer is 504."""
    max_in_flight: int = 512
    """Requests that one gateway serves at once; the answer to more is 503."""
    image: OnlineImageLimits = field(
        default=OnlineImageLimits(), metadata=prefixed("image") | hiding("accept_truncated")
    )
    """limits for one image"""
    decode_children: int = 2
    """Processes per gateway that decode images; reserve as many CPUs for the gateway."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be above 0 and finite, got {self.timeout_s}")
        if not 1 <= self.max_in_flight <= MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight must be from 1 to {MAX_IN_FLIGHT}, got {self.max_in_flight}")
        if self.decode_children < 1:
            raise ValueError(f"decode_children must be at least 1, got {self.decode_children}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """Serve captions over HTTP from this machine, until Ctrl-C or SIGTERM."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every address of the machine."""
    port: int = 8000
    """Port to listen on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")
