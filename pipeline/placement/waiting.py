"""Waiting for the cluster, never in silence: what is awaited, since when, and what the autoscaler says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray

from pipeline.progress import LOG_EVERY_S

Say = Callable[[str], Any]
"""Prints a line for people."""


def wait_for(answer: Any, what: str, say: Say, every_s: float = LOG_EVERY_S) -> Any:
    """Return the value of an object reference; while it is not there, say now and then what is awaited.

    Args:
        what: is awaited, in words.
        every_s: seconds between two lines.

    Raises:
        ray.exceptions.RayError: the task has failed.
    """
    since = datetime.now(UTC)
    while True:
        done, _ = ray.wait([answer], timeout=every_s)
        if done:
            return ray.get(answer)
        say(f"waiting for {what} since {since:%H:%M:%S} UTC{_autoscaler_says()}")


def _autoscaler_says() -> str:
    """Return what the autoscaler does about pending requests, as the end of a sentence."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # Ray raises many types, and a cluster may run its older autoscaler.
        return ""
    starting = [f"{launch.count} {launch.ray_node_type_name}" for launch in status.pending_launches]
    starting += [f"1 {node.ray_node_type_name}" for node in status.pending_nodes]
    failed = [f"{launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches[-1:]]
    return "".join(
        [
            f"; the autoscaler starts {', '.join(starting)}" if starting else "",
            f"; the autoscaler could not start a node ({failed[0]})" if failed else "",
        ]
    )
