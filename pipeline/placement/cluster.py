"""`Cluster`: the nodes that Ray has now, and those that its autoscaler may add."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ray

from pipeline.placement.node_types import NodeType, autoscaler_node_types
from pipeline.progress import count

HIDDEN = ("node:", "memory", "object_store_memory")
"""Prefixes of resources that messages leave out."""
NODE_TYPE = "ray.io/node-group"
"""Label with the node type of a node that the autoscaler has started."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    resources: Mapping[str, float]
    """Resources by their names in Ray: CPU, GPU, NPU, accelerator_type:L40S and so on."""
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Cluster:
    """The nodes that Ray has and may get; all of this may change while a job runs."""

    nodes: tuple[Node, ...]
    node_types: tuple[NodeType, ...] | None = ()
    """What the autoscaler may start; None if that cannot be found out."""
    is_local: bool = True
    """Whether this process started Ray; then it never gets more nodes."""

    @property
    def kinds(self) -> list[Node | NodeType]:
        """The nodes, alive or not yet started."""
        return [*self.nodes, *(self.node_types or ())]

    def total(self, resource: str, labels: Mapping[str, str] = {}) -> float:
        """Return how much of a resource the nodes that label selectors choose have now."""
        chosen = (node for node in self.nodes if has_labels(node.labels, labels))
        return sum(node.resources.get(resource, 0.0) for node in chosen)

    def largest(
        self, resource: str, labels: Mapping[str, str] = {}, others: Mapping[str, float] = {}
    ) -> float:
        """Return how much of a resource the best node has, alive or not yet started; 0 if there is none.

        Args:
            labels: label selectors of the nodes.
            others: other resources that the node must have.
        """
        chosen = (kind for kind in self.kinds if num_fitting(kind, others, labels))
        return max((kind.resources.get(resource, 0.0) for kind in chosen), default=0.0)

    def fitting(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
        """Return how many workers fit at the same time, including on nodes that the autoscaler may add.

        Args:
            resources: what each worker reserves.
            labels: label selectors of the nodes.
        """
        kinds = self.node_types or ()
        names = {kind.name for kind in kinds}
        alive = (node for node in self.nodes if node.labels.get(NODE_TYPE) not in names)
        room = min((kind.max_of_all for kind in kinds), default=0)
        may_be_added = 0
        for kind in sorted(kinds, key=lambda kind: num_fitting(kind, resources, labels), reverse=True):
            num_nodes = min(kind.max_nodes, room)
            may_be_added += num_nodes * num_fitting(kind, resources, labels)
            room -= num_nodes
        return sum(num_fitting(node, resources, labels) for node in alive) + may_be_added

    def cannot_offer(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Return whether no node, alive or not yet started, can ever run a worker with these resources."""
        is_known = self.node_types is not None
        return is_known and not any(num_fitting(kind, resources, labels) for kind in self.kinds)

    def __str__(self) -> str:
        has = _listed(node.resources for node in self.nodes) or "no CPU"
        if self.is_local:
            return f"this machine has {has}"
        alive = f"the cluster has {has} on {count(len(self.nodes), 'node')}"
        if not self.node_types:
            return f"{alive}, and no autoscaler adds nodes"
        return f"{alive}, and its autoscaler may add nodes with " + " or with ".join(
            f"{_listed([kind.resources])} ({kind.name})" for kind in self.node_types
        )


def num_fitting(node: Node | NodeType, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """Return how many workers fit on one node if nothing else runs there; unknown labels fit."""
    if node.labels is not None and not has_labels(node.labels, labels):
        return 0
    needs = {name: amount for name, amount in resources.items() if amount}
    return min((math.floor(node.resources.get(n, 0.0) / amount) for n, amount in needs.items()), default=1)


def has_labels(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Return whether a node with these labels is one that all selectors choose, as Ray evaluates them.

    Args:
        selectors: by the key of a label: a value, `!value`, `in(a, b)` or `!in(a, b)`. As in Ray, the negated
            ones choose a node without the label.
    """
    return all(_chooses(selector, labels.get(key)) for key, selector in selectors.items())


def _chooses(selector: str, value: str | None) -> bool:
    wanted = selector.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        is_among = value in [each.strip() for each in wanted[3:-1].split(",")]
    else:
        is_among = value == wanted
    return is_among != selector.startswith("!")


def _listed(resources: Iterable[Mapping[str, float]]) -> str:
    """Return totals by name: "16 CPU, 1 GPU"."""
    totals: dict[str, float] = {}
    for each in resources:
        for name, amount in each.items():
            totals[name] = totals.get(name, 0.0) + amount
    shown = {name: amount for name, amount in sorted(totals.items()) if not name.startswith(HIDDEN)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items() if amount)


def look_at_cluster() -> Cluster:
    """Describe the cluster to which this process is connected."""
    from ray._private import worker

    nodes = nodes_alive()
    started_here = worker._global_node is not None and worker._global_node.head
    if started_here:
        return Cluster(nodes)
    return Cluster(nodes, autoscaler_node_types(), is_local=False)


def nodes_alive() -> tuple[Node, ...]:
    """Return the nodes of the cluster to which this process is connected."""
    return tuple(
        Node(node["Resources"], node.get("Labels") or {}, node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    )
