"""Ray's functions are replaced inside a block, and come back after it."""

from __future__ import annotations

import pickle

import pytest
import ray
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.stats import _StatsManager

from pipeline.local_ray.fewer_processes import NoTracker, replaced, without_helper_actors
from pipeline.local_ray.one_machine import OneMachine


class OneNode:
    """Stands in for Ray's runtime context."""

    def get_node_id(self) -> str:
        return "n1"


def test_no_helper_actor_is_asked_for_inside_the_block(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", OneNode)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 8.0})
    originals = [
        vars(_StatsManager)["update_execution_metrics"],
        streaming_executor.create_cluster_autoscaler,
        actor_pool_map_operator.get_actor_locations,
    ]
    with without_helper_actors():
        assert _StatsManager.update_execution_metrics("dataset", [], [], {}) is None
        autoscaler = streaming_executor.create_cluster_autoscaler({}, None, None, execution_id="1")
        assert isinstance(autoscaler, OneMachine) and autoscaler.get_total_resources().cpu == 2
        assert actor_pool_map_operator.get_actor_locations(("a", "b")) == {"a": "n1", "b": "n1"}
        tracker = actor_pool_map_operator.get_or_create_actor_location_tracker()
        assert pickle.loads(pickle.dumps(tracker)).update_actor_location.remote("a", "n1") is None
    assert originals == [
        vars(_StatsManager)["update_execution_metrics"],
        streaming_executor.create_cluster_autoscaler,
        actor_pool_map_operator.get_actor_locations,
    ]


def test_what_another_version_of_ray_does_not_have_is_not_replaced():
    with pytest.raises(KeyError, match="no_longer"), replaced(NoTracker, {"remote": None, "no_longer": None}):
        pass
    assert NoTracker.remote.__name__ == "remote"
