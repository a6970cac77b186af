"""What Ray Data learns about its cluster on one machine."""

from __future__ import annotations

import ray
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler


class OneMachine(ClusterAutoscaler):
    """All of this machine belongs to the one dataset that runs, and nothing adds to it."""

    def __init__(self) -> None:
        self._total = ExecutionResources.from_resource_dict(ray.cluster_resources())

    def get_total_resources(self) -> ExecutionResources:
        return self._total

    def try_trigger_scaling(self) -> None:
        """Do nothing."""

    def on_executor_shutdown(self) -> None:
        """Do nothing."""
