"""What the autoscaler of a cluster says about requested resources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import ray

ANSWER_S = 5


def autoscaler_says() -> str:
    """Return what the autoscaler does about requests that wait, as the end of a sentence; "" if nothing."""
    from ray.autoscaler.v2 import sdk

    try:
        client = sdk.GcsClient(ray.get_runtime_context().gcs_address)
        reply = client.get_cluster_status(timeout_s=ANSWER_S)
    except Exception:  # Ray raises many types, and a cluster may run its older autoscaler.
        return ""
    return words_of(reply)


def words_of(serialized: bytes) -> str:
    """Return the words for the status of a cluster, as its head reports it."""
    from ray.autoscaler.v2.schema import Stats
    from ray.autoscaler.v2.utils import ClusterStatusParser
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(serialized)
    status = ClusterStatusParser.from_get_cluster_status_reply(reply, Stats())
    state = reply.autoscaling_state
    unmet = [dict(request.resources_bundle) for request in state.infeasible_resource_requests]
    for gang in state.infeasible_gang_resource_requests:
        unmet += [dict(request.resources_bundle) for request in gang.requests]
    return says(status.pending_launches, status.pending_nodes, status.failed_launches, unmet)


def says(
    launches: Iterable[Any], nodes: Iterable[Any], failed: Sequence[Any], unmet: Iterable[dict[str, float]]
) -> str:
    """Return the words for what an autoscaler reports.

    Args:
        launches: nodes that it has asked the cloud for, with `count` and `ray_node_type_name`.
        nodes: nodes that start, with `ray_node_type_name`.
        failed: launches that have failed, oldest first, with `details` too.
        unmet: resources of the requests for which it can start no node.
    """
    starting: Counter[str] = Counter()
    for launch in launches:
        starting[launch.ray_node_type_name] += launch.count
    starting.update(node.ray_node_type_name for node in nodes)
    requests = Counter(_listed(resources) for resources in unmet)
    phrases = []
    if starting:
        listed = ", ".join(f"{number} {name}" for name, number in sorted(starting.items()))
        phrases.append(f"the autoscaler starts {listed}")
    if failed:
        last = failed[-1]
        phrases.append(f"the autoscaler could not start {last.ray_node_type_name}: {last.details}")
    if requests:
        listed = ", ".join(f"{number} × {resources}" for resources, number in sorted(requests.items()))
        phrases.append(f"the autoscaler says that no node it may start has room for {listed}")
    return "".join(f"; {phrase}" for phrase in phrases)


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()) if amount)
