"""The node types of a cluster's autoscaler: which nodes it may start, and how many of each.

Ray 2.60 has no interface for this question. Its autoscaler reads a configuration on the head node: a file
that `ray up` has put there, or the RayCluster resource of Kubernetes. A task on the head reads the same.
Managed platforms report their node types to Ray instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

HEAD = "node:__internal_head__"
"""A resource that only the head node has."""
ANSWER_S = 20.0
"""How long the head may take to answer; it may have to start a worker first."""
MANY_NODES = 1000
"""Number of nodes of a node type without a limit."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class NodeType:
    """One kind of node that the autoscaler may start."""

    name: str
    max_nodes: int
    resources: Mapping[str, float]
    """Resources of one node."""
    labels: Mapping[str, str] | None = field(default_factory=dict)
    """None if the platform does not report them."""
    max_of_all: int = MANY_NODES
    """Nodes of all types that the autoscaler may start together."""


def autoscaler_node_types() -> tuple[NodeType, ...] | None:
    """Return what the autoscaler of the connected cluster may start.

    Returns:
        The node types; () if the cluster has no autoscaler; None if that cannot be found out.
    """
    from ray._private.state import state

    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        return tuple(
            NodeType(
                group.name,
                MANY_NODES if group.max_count < 0 else group.max_count,
                {name: float(amount) for name, amount in group.resources.items()},
                labels=None,
            )
            for group in reported.node_group_configs
            if group.max_count
        )
    on_head = ray.remote(_read_configuration).options(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)
    try:
        configuration = ray.get(on_head.remote(ray.get_runtime_context().gcs_address), timeout=ANSWER_S)
    except ray.exceptions.RayError:
        return None
    return node_types_of(configuration)


def node_types_of(configuration: Mapping[str, Any]) -> tuple[NodeType, ...]:
    """Return the node types of a configuration as the autoscaler has it; () if it is empty."""
    total = configuration.get("max_workers", MANY_NODES)
    kinds = configuration.get("available_node_types", {})
    return tuple(
        NodeType(
            name,
            min(total, int(kind.get("max_workers", total))),
            {resource: float(amount) for resource, amount in kind.get("resources", {}).items()},
            kind.get("labels") or {},
            total,
        )
        for name, kind in kinds.items()
        if name != configuration.get("head_node_type") and kind.get("max_workers", total)
    )


def _read_configuration(gcs_address: str) -> dict[str, Any]:
    """Read, on the head node, what the autoscaler reads; {} if there is no autoscaler."""
    import psutil
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        path = configuration_file(process.info["cmdline"] or (), gcs_address)
        if path is not None:
            return yaml.safe_load(Path(path).read_text())
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not NAMESPACE_FILE.exists():
        return {}
    # KubeRay's autoscaler runs in a container of its own in the head's pod, with the same service account.
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    producer = AutoscalingConfigProducer(name, NAMESPACE_FILE.read_text().strip())
    cluster = producer.kubernetes_api_client.get(producer._ray_cr_path)
    return producer() if cluster["spec"].get("enableInTreeAutoscaling") else {}


def configuration_file(command_line: Iterable[str], gcs_address: str) -> str | None:
    """Return the configuration that a process was given, if it is the autoscaler of this cluster."""
    options = dict(word.partition("=")[::2] for word in command_line if word.startswith("--"))
    is_ours = options.get("--gcs-address") == gcs_address
    return options.get("--autoscaling-config") or None if is_ours else None
