"""`View`: the nodes of a cluster and the workers of a job, as Ray knows them at one moment.

A worker is an actor of one of the job's pools. Ray starts it again in a new process when its process dies,
and on another node when its node is lost. Workers that Ray Data lets go are left out: their work is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

CAPTIONING, DECODING = "captioning", "decoding"
STAGES = {"WriteStage": CAPTIONING, "DecodeStage": DECODING}
"""The stage in words, by a part of the class name of its actors."""
RUNS, LOADS, WAITS, DIED = "runs", "loads", "waits", "died"
"""States of a worker: it is at work, its process starts, no node has room for it, Ray has given it up."""
LET_GO = ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED")
"""Ray's reasons for ending an actor that is no longer needed."""
LEFT = (1, 4)
"""Ray's numbers of the reasons for which a node is gone but not lost: stopped on purpose, or idle."""


@dataclass(frozen=True)
class NodeSeen:
    """A node, alive or gone."""

    host: str
    resources: Mapping[str, float]
    is_alive: bool = True
    is_missed: bool = True
    """False if it is gone because it was stopped on purpose."""
    reason: str = ""
    """Why it is gone, in the words of Ray."""

    def __str__(self) -> str:
        has = ", ".join(f"{amount:g} {name}" for name, amount in sorted(self.resources.items()))
        return f"{self.host} ({has})" if has else self.host


@dataclass(frozen=True)
class WorkerSeen:
    """An actor of one of the job's pools."""

    stage: str
    state: str
    pid: int
    node: str
    """Id of its node; of the last one, if that is lost."""


@dataclass(frozen=True)
class View:
    """What is there at one moment."""

    nodes: Mapping[str, NodeSeen] = field(default_factory=dict)
    """Nodes by id, including those that are gone."""
    workers: Mapping[str, WorkerSeen] = field(default_factory=dict)
    """Workers by the id of their actor."""

    @property
    def num_nodes(self) -> int:
        return sum(node.is_alive for node in self.nodes.values())

    def of(self, stage: str, state: str = RUNS) -> dict[tuple[str, int], WorkerSeen]:
        """Return the workers of a stage in a state, by actor and process."""
        wanted = (stage, state)
        return {(key, w.pid): w for key, w in self.workers.items() if (w.stage, w.state) == wanted}

    def host(self, worker: WorkerSeen) -> str:
        return self.nodes[worker.node].host if worker.node in self.nodes else "an unknown node"

    def name(self, worker: WorkerSeen) -> str:
        """Return how messages call a worker."""
        return f"{worker.stage} worker {worker.pid} on {self.host(worker)}"


def look_at_members() -> View:
    """Describe the nodes of the connected Ray, and the workers of this job."""
    from ray._private import worker as ray_worker
    from ray._private.state import actors

    nodes = {node["NodeID"]: _node(node) for node in ray.nodes()}
    workers = {}
    for key, actor in actors(job_id=ray_worker.global_worker.current_job_id).items():
        stage = next((stage for name, stage in STAGES.items() if name in actor["ActorClassName"]), None)
        state = state_of(actor, nodes)
        if stage is not None and state is not None:
            workers[key] = WorkerSeen(stage, state, actor["Pid"], actor["Address"]["NodeID"])
    return View(nodes, workers)


def _node(node: Mapping[str, Any]) -> NodeSeen:
    shown = {name: n for name, n in node["Resources"].items() if ":" not in name and "memory" not in name}
    reason = (node.get("DeathReasonMessage") or "").partition("\n")[0].rstrip(".")
    is_missed = node.get("DeathReason", 0) not in LEFT
    return NodeSeen(node["NodeManagerHostname"], shown, node["Alive"], is_missed, reason)


def state_of(actor: Mapping[str, Any], nodes: Mapping[str, NodeSeen]) -> str | None:
    """Return the state of an actor; None if it was let go."""
    state = actor["State"]
    if state == "ALIVE":
        return RUNS
    if state == "DEAD":
        context = actor["DeathCause"].actor_died_error_context if actor["DeathCause"] else None
        reason = None if context is None else type(context).Reason.Name(context.reason)
        return None if reason in LET_GO else DIED
    node = nodes.get(actor["Address"]["NodeID"])
    has_process = actor["Pid"] and node is not None and node.is_alive
    return LOADS if has_process else WAITS
