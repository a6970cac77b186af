"""Let Ray start fewer processes on one machine.

Each process that imports Ray costs half a second of CPU time, with Ray Data a second, and a small job waits
for all of them. Those left out here serve a cluster, and have nothing to do on one machine. Ray has no
settings for this, so that its functions are replaced (Ray 2.60).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_idle_processes() -> Iterator[None]:
    """Let `ray.init` start fewer processes inside the block, so that a local Ray starts and ends faster.

    Left out are the autoscaler, the process that copies the output of workers, and a server for usage
    statistics. Ray waits for that server even without a dashboard, and at the end it waits a second for the
    autoscaler.
    """
    from ray._private.node import Node

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    with replaced(Node, dict.fromkeys(names, _do_nothing)):
        yield


@contextmanager
def without_helper_actors() -> Iterator[None]:
    """Let Ray Data run without its three helper actors inside the block, on a connected Ray of one node.

    They collect statistics for the dashboard, divide a cluster and its autoscaler among several datasets,
    and remember on which node each actor of a pool is. No task starts before the second one has answered.
    """
    import ray
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.operators import actor_pool_map_operator
    from ray.data._internal.stats import _StatsManager

    from pipeline.local_ray.one_machine import OneMachine

    node_id = ray.get_runtime_context().get_node_id()
    statistics = (
        "register_dataset_to_stats_actor",
        "update_execution_metrics",
        "update_iteration_metrics",
    )
    locations = {
        "get_or_create_actor_location_tracker": NoTracker,
        "get_actor_locations": lambda actors: dict.fromkeys(actors, node_id),
    }
    with (
        replaced(_StatsManager, dict.fromkeys(statistics, _do_nothing)),
        replaced(streaming_executor, {"create_cluster_autoscaler": lambda *_, **__: OneMachine()}),
        replaced(actor_pool_map_operator, locations),
    ):
        yield


class NoTracker:
    """Stands in for the handle of Ray Data's `ActorLocationTracker`, in the workers too."""

    @property
    def update_actor_location(self) -> NoTracker:
        """The method that workers call to say where they are."""
        return self

    def remote(self, *_: Any) -> None:
        """Do nothing: they are on the one node."""


@contextmanager
def replaced(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Replace attributes of a class or a module inside the block.

    Raises:
        KeyError: `owner` itself does not define one of them.
    """
    originals = {name: vars(owner)[name] for name in attributes}
    for name, stand_in in attributes.items():
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def _do_nothing(*_: Any, **__: Any) -> None:
    return None
