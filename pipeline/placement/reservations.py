"""What each stage reserves in Ray, and how many workers it may have.

The rule: reading, decoding and captioning must fit into the cluster at the same time, or no row moves. A job
therefore runs on two cores as well as on a cluster. If a cluster may grow, nothing is sized by what it has at
the start: without a limit by the user, pools take what nodes offer, and the autoscaler sees their demand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blip2_actor import EngineBuilder
from pipeline.endpoint.settings import EndpointConfig
from pipeline.errors import RefusedByCluster
from pipeline.placement.cluster import Cluster
from pipeline.settings.placement import Placement

CPU_CAPTION_SHARE = 0.6
"""Share of a node's CPUs that a captioning actor without an accelerator reserves, so that one fits on each
node."""


@dataclass(frozen=True)
class Reservation:
    """What one worker of a stage reserves."""

    num_cpus: float = 0.0
    accelerators: Mapping[str, float] = field(default_factory=dict)
    """Accelerators by their names in Ray; empty on CPUs."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label selectors of the nodes on which the worker may run."""

    @property
    def options(self) -> dict[str, Any]:
        """The reservation as options of Ray's tasks, actors and datasets."""
        others = {name: amount for name, amount in self.accelerators.items() if name != "GPU"}
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.accelerators.get("GPU"),
            "resources": others or None,
            "label_selector": dict(self.labels) or None,
        }

    def __str__(self) -> str:
        cpus = {"CPU": self.num_cpus} if self.num_cpus else {}
        listed = [f"{amount:g} {name}" for name, amount in (self.accelerators or cpus).items()]
        listed += [f"{name}={value}" for name, value in self.labels.items()]
        return ", ".join(listed)


@dataclass(frozen=True)
class Reservations:
    """The reservation of each stage, and the size of the captioning pool."""

    read: Reservation
    decode: Reservation
    caption: Reservation
    min_actors: int
    """Number of captioning actors from the start on; the autoscaler starts nodes for those that wait."""
    max_actors: int | None
    """Maximum number of captioning actors; None if only the nodes limit it."""
    max_open_shards: int | None
    """Maximum number of shards that are read at the same time; None if only the nodes limit it."""
    max_decode_actors: int | None
    """Maximum number of decoding actors; None if only the nodes limit it."""
    num_threads: int | None
    """Threads of the engine on CPUs; None on accelerators. Without this, Ray limits the threads of a worker
    to the number of whole CPUs that it reserves."""
    max_block_bytes: int | None
    """Maximum size of a block of rows in memory; None if the size of the object stores is unknown."""


MIN_OPEN_SHARDS = 2
"""Shards read at the same time on one machine; on more CPUs, one per CPU. Ray keeps that many idle workers;
more shards at a time would start new processes."""
BLOCKS_PER_STORE = 32
"""Blocks that the smallest object store of a node must hold: each of eight captioning calls has one, others
wait, and Ray begins to write blocks to disk when a store is 80 % full."""
BYTES_PER_WORKER = 16 << 20
"""Input that is worth another process on one machine: starting one takes as long as decoding this much."""


def reserve(
    placement: Placement,
    cluster: Cluster,
    engine: EngineBuilder,
    num_shards: int = 1,
    num_bytes: int | None = None,
) -> Reservations:
    """Fit the stages into a cluster.

    On nodes of up to four cores, decoding and captioning reserve a quarter of the cores each. This leaves
    room for reading, and for a step of the user's own that reserves one core of two. Captioning still
    computes on every core of its node: a reservation only limits what Ray schedules.

    Ray Data asks for more accelerators only when it has measured several calls, which takes minutes. A job on
    a cluster with an autoscaler therefore asks for all of them at the start, but for at most one per shard.

    Args:
        num_shards: shards that are still to do.
        num_bytes: bytes of them that are to be read and decoded; None if unknown.

    Raises:
        RefusedByCluster: no node that is alive, or that the autoscaler may start, has what a stage needs.
    """
    read = Reservation(_share(cluster, placement.labels("read")) / 2, labels=placement.labels("read"))
    decode = Reservation(_share(cluster, placement.labels("decode")), labels=placement.labels("decode"))
    wanted = accelerators_of(placement, cluster, engine)
    caption = Reservation(accelerators=wanted, labels=placement.labels("caption"))
    min_actors, max_actors, num_threads = placement.min_actors, placement.max_actors, None
    if wanted:
        offered = cluster.fitting(wanted, caption.labels)
        # Ray Data limits a pool by the GPUs of all nodes, and by no other accelerators.
        is_limited_by_ray = not cluster.is_local and wanted.keys() == {"GPU"} and not caption.labels
        if max_actors is None and not is_limited_by_ray:
            max_actors = max(min_actors, offered)
        if cluster.node_types:
            min_actors = max(min_actors, min(num_shards, offered, max_actors or offered))
    elif isinstance(engine, EndpointConfig):  # its workers only send and wait
        caption = dataclasses.replace(caption, num_cpus=_share(cluster, caption.labels) / 2)
        max_actors = min_actors if max_actors is None else max_actors
    else:
        caption, num_threads = _on_cpus(caption, placement, cluster)
        if max_actors is None and cluster.is_local:
            max_actors = placement.min_actors
    max_open_shards, max_decode_actors = None, placement.max_decode_actors
    if cluster.is_local:
        max_open_shards = max(MIN_OPEN_SHARDS, int(cluster.total("CPU")))
        if num_bytes is not None:
            num_workers = 1 + num_bytes // BYTES_PER_WORKER
            max_open_shards = min(max_open_shards, num_workers)
            max_decode_actors = min(max_decode_actors or num_workers, num_workers)
    _require_offered(cluster, read, decode, caption)
    return Reservations(
        read=read,
        decode=decode,
        caption=caption,
        min_actors=min_actors,
        max_actors=max_actors,
        max_open_shards=max_open_shards,
        max_decode_actors=max_decode_actors,
        num_threads=num_threads,
        max_block_bytes=_max_block_bytes(cluster),
    )


def _share(cluster: Cluster, labels: Mapping[str, str]) -> float:
    """Return the cores that a decoding actor reserves on the nodes that label selectors choose."""
    return min(1.0, _node_cpus(cluster, labels) / 4)


def _node_cpus(cluster: Cluster, labels: Mapping[str, str]) -> float:
    """Return the cores of the largest node that label selectors choose, or of any node if none is known."""
    return max(1.0, cluster.largest("CPU", labels) or cluster.largest("CPU"))


def _max_block_bytes(cluster: Cluster) -> int | None:
    stores = (
        node.resources.get("object_store_memory") for node in cluster.nodes if node.resources.get("CPU")
    )
    smallest = min((size for size in stores if size), default=None)
    return None if smallest is None else int(smallest) // BLOCKS_PER_STORE


def _on_cpus(caption: Reservation, placement: Placement, cluster: Cluster) -> tuple[Reservation, int]:
    """Return the reservation of an actor without accelerator, and the threads of its engine."""
    node_cpus = _node_cpus(cluster, caption.labels)
    if placement.max_actors is None and not cluster.is_local:
        return dataclasses.replace(caption, num_cpus=node_cpus * CPU_CAPTION_SHARE), math.floor(node_cpus)
    nodes = max(1, round(cluster.total("CPU", caption.labels) / node_cpus))
    per_node = math.ceil((placement.max_actors or placement.min_actors) / nodes)
    num_threads = max(1, math.floor(node_cpus / per_node))
    return dataclasses.replace(caption, num_cpus=node_cpus / 4 / per_node), num_threads


def accelerators_of(placement: Placement, cluster: Cluster, engine: EngineBuilder) -> dict[str, float]:
    """Return the accelerators of a captioning actor, by their names in Ray; empty on CPUs.

    On a cluster an actor takes accelerators unless its engine must run on CPUs, even if no node with one is
    alive yet. On one machine the engine takes what is there.
    """
    named = placement.accelerators
    if named is not None:
        return named
    device = getattr(engine, "device", None)
    if device == "cpu":
        return {}
    splits = getattr(engine, "device_map", None) is not None
    typed = placement.of_accelerator_type
    number = max(1.0, cluster.largest("GPU", placement.labels("caption"), typed)) if splits else 1.0
    is_offered = cluster.fitting({"GPU": number}, {}) > 0
    is_asked = device is not None and not cluster.is_local
    return {"GPU": number, **typed} if is_offered or is_asked or typed else {}


def _require_offered(cluster: Cluster, read: Reservation, decode: Reservation, caption: Reservation) -> None:
    """Raise RefusedByCluster if a stage needs what no node has or will have: it would wait for ever.

    Reservations of cores alone always fit, because they are sized by the nodes.
    """
    stages = (
        ("a captioning actor", "--caption-label", caption),
        ("a decoding actor", "--decode-label", decode),
        ("reading", "--read-label", read),
    )
    for who, flag, needed in stages:
        is_special = needed.accelerators or needed.labels
        resources = {"CPU": needed.num_cpus, **needed.accelerators}
        if not is_special or not cluster.cannot_offer(resources, needed.labels):
            continue
        remedies = ["start such nodes"]
        if needed.labels:
            remedies.append(f"correct {flag}")
        if needed.accelerators:
            remedies.append("name what they have with --accelerator NAME=N")
            remedies.append("add --device cpu to caption on CPUs")
        *first, last = remedies
        remedy = f"{', '.join(first)}, or {last}" if first else last
        raise RefusedByCluster(f"{who} needs {needed}, and no node offers it: {cluster}; {remedy}")


def fit(placement: Placement, num_fitting: int, cluster: Cluster) -> Placement:
    """Return a placement with at most `num_fitting` actors at the start, and later if no node can join."""
    min_actors, max_actors = min(placement.min_actors, num_fitting), placement.max_actors
    if not cluster.node_types:
        max_actors = num_fitting if max_actors is None else min(max_actors, num_fitting)
    return dataclasses.replace(placement, min_actors=min_actors, max_actors=max_actors)


def resolve_engine(engine: EngineBuilder, reservations: Reservations) -> EngineBuilder:
    """Return the engine with device and number of threads filled in, if the user has left them open."""
    known: Any = engine
    names = {each.name for each in dataclasses.fields(known)}
    if reservations.caption.accelerators:
        return engine
    changes: dict[str, Any] = {}
    if "num_threads" in names and known.num_threads is None:
        changes["num_threads"] = reservations.num_threads
    if "device" in names and known.device == "auto":
        changes["device"] = "cpu"
    return dataclasses.replace(known, **changes)
