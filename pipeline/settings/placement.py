"""Where the stages run: how many actors, and what each of them reserves in Ray.

The rule: reading, decoding and captioning must fit into the cluster at the same time, or no row moves. A job
therefore runs on two cores as well as on a cluster.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from blip2_actor import EngineBuilder


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many actors caption and decode, and the accelerators that each captioning actor takes."""

    min_actors: int = 1
    """Minimum number of captioning actors, which run from start to end."""
    max_actors: int | None = None
    """Maximum number of captioning actors; default: one per accelerator of the cluster, or one on CPUs."""
    num_gpus: float | None = None
    """Accelerators per captioning actor; default: 1 if the cluster has any, else 0."""
    calls_per_actor: int = 8
    """Number of calls, each with one block of images, that one actor runs at the same time."""
    max_decode_actors: int | None = None
    """Maximum number of decoding actors, with one decoding process each; default: as many
    as fit into the cluster."""

    step_timeout_s: float = 600.0
    """Seconds without progress of an engine that has work, after which its process is replaced and its images
    go again. The first result may take three times as long, because a model may be compiled before it."""

    def __post_init__(self) -> None:
        if not self.step_timeout_s > 0:
            raise ValueError(f"step_timeout_s must be above 0, got {self.step_timeout_s}")
        for name in ("min_actors", "max_actors", "calls_per_actor", "max_decode_actors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors must be at least min_actors ({self.min_actors}), got {self.max_actors}"
            )
        if self.num_gpus is not None and self.num_gpus < 0:
            raise ValueError(f"num_gpus must be at least 0, got {self.num_gpus}")


@dataclass(frozen=True)
class ClusterSize:
    """The resources that a cluster has now; a cluster that starts nodes on demand may get more later."""

    num_cpus: float
    num_gpus: float
    cpus_per_node: float


@dataclass(frozen=True)
class Reservations:
    """The resources that each stage reserves in Ray, and the size of the captioning pool."""

    read_cpus: float
    decode_cpus: float
    caption_cpus: float
    caption_gpus: float
    max_actors: int
    num_threads: int | None
    """Threads of the engine on CPUs; None on accelerators. Without this, Ray limits the threads of a worker
    to the number of whole CPUs that it reserves."""


def reserve(placement: Placement, cluster: ClusterSize) -> Reservations:
    """Fit the stages into a cluster.

    On up to four cores, decoding and captioning reserve a quarter of the cores each. This leaves room for
    reading, and for a step of the user's own that reserves one core of two. Captioning still computes on
    every core of its node: a reservation only limits what Ray schedules.
    """
    num_gpus = placement.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if cluster.num_gpus else 0.0
    max_actors = placement.max_actors
    if max_actors is None:
        num_fitting = math.floor(cluster.num_gpus / num_gpus) if num_gpus else 1
        max_actors = max(placement.min_actors, num_fitting)
    share = min(1.0, max(cluster.num_cpus, 1.0) / 4)
    node_cpus = max(1.0, cluster.cpus_per_node)
    nodes = max(1, round(cluster.num_cpus / node_cpus))
    per_node = math.ceil(max_actors / nodes)
    return Reservations(
        read_cpus=share / 2,
        decode_cpus=share,
        caption_cpus=0.0 if num_gpus else node_cpus / 4 / per_node,
        caption_gpus=num_gpus,
        max_actors=max_actors,
        num_threads=None if num_gpus else max(1, math.floor(node_cpus / per_node)),
    )


def fit(placement: Placement, cluster: ClusterSize) -> Placement:
    """Return a placement with no more captioning actors than a cluster has accelerators for."""
    num_gpus = reserve(placement, cluster).caption_gpus
    num_fitting = max(1, math.floor(cluster.num_gpus / num_gpus)) if num_gpus else 1
    return dataclasses.replace(
        placement,
        min_actors=min(placement.min_actors, num_fitting),
        max_actors=None if placement.max_actors is None else min(placement.max_actors, num_fitting),
    )


def resolve_engine(engine: EngineBuilder, reservations: Reservations) -> EngineBuilder:
    """Return the engine with device and number of threads filled in, if the user has left them open."""
    known: Any = engine
    names = {field.name for field in dataclasses.fields(known)}
    if reservations.caption_gpus:
        return engine
    changes: dict[str, Any] = {}
    if "num_threads" in names and known.num_threads is None:
        changes["num_threads"] = reservations.num_threads
    if "device" in names and known.device == "auto":
        changes["device"] = "cpu"
    return dataclasses.replace(known, **changes)
