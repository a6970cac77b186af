"""Messages about a cluster's members: who was lost, who came back, and what the run waits for."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.watch import members as members_module
from pipeline.watch.autoscaler import says, words_of
from pipeline.watch.members import Members
from pipeline.watch.view import LOADS, RUNS, WAITS, NodeSeen, View, WorkerSeen, state_of
from pipeline.watch.waiting import Reminder

A = NodeSeen("host-a", {"CPU": 8.0, "GPU": 1.0})
B = NodeSeen("host-b", {"CPU": 8.0, "GPU": 1.0})
LOST = dataclasses.replace(
    B, resources={}, is_alive=False, reason="health check failed due to missing too many heartbeats"
)
STOPPED = dataclasses.replace(B, is_alive=False, is_missed=False, reason="idle")


def worker(state: str = RUNS, pid: int = 7, node: str = "a", stage: str = "captioning") -> WorkerSeen:
    return WorkerSeen(stage, state, pid, node)


class Told:
    """Takes views, and records the messages about each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_local: bool = False, says: str = "") -> None:
        monkeypatch.setattr(members_module, "autoscaler_says", lambda: says)
        self._said: list[str] = []
        self.members = Members(self._said.append, {"captioning": "1 GPU", "decoding": "1 CPU"}, is_local)

    def __call__(self, nodes: dict[str, NodeSeen], **workers: WorkerSeen) -> list[str]:
        self._said.clear()
        self.members.take(View(nodes, workers))
        return list(self._said)


def test_a_lost_node_and_its_worker_are_named_and_so_is_the_worker_that_comes_back(monkeypatch):
    told = Told(monkeypatch)
    assert told({"a": A, "b": B}, x=worker(), y=worker(pid=8, node="b")) == [
        "2 captioning workers are ready; 2 at work"
    ]
    assert told({"a": A, "b": LOST}, x=worker(), y=worker(WAITS, 8, "b")) == [
        "node host-b (8 CPU, 1 GPU) was lost: health check failed due to missing too many heartbeats; "
        "the cluster has 1 node left",
        "captioning worker 8 on host-b was lost: its node is gone; 1 captioning worker left, and its images "
        "go again",
    ]
    again = NodeSeen("host-c", {"GPU": 1.0})
    assert told({"a": A, "b": LOST, "c": again}, x=worker(), y=worker(LOADS, 9, "c")) == [
        "node host-c (1 GPU) joined; the cluster has 2 nodes"
    ]
    assert told({"a": A, "b": LOST, "c": again}, x=worker(), y=worker(pid=9, node="c")) == [
        "captioning worker 9 on host-c is ready; 2 at work"
    ]


def test_a_process_that_dies_and_comes_back_between_two_looks_is_named(monkeypatch):
    told = Told(monkeypatch, is_local=True)
    assert told({"a": A}, x=worker()) == [], "the phases of the start tell of the first worker"
    assert told({"a": A}, x=worker(pid=9)) == [
        "captioning worker 7 on host-a was lost: its process has died; 1 captioning worker left, and its "
        "images go again",
        "captioning worker 9 on host-a is ready; 1 at work",
    ]


def test_workers_that_are_let_go_and_nodes_that_are_stopped_are_not_lost(monkeypatch):
    told = Told(monkeypatch)
    told({"a": A, "b": B}, x=worker(), y=worker(pid=8, node="b"), z=worker(pid=9, node="b", stage="decoding"))
    assert told({"a": A, "b": STOPPED}, x=worker()) == [
        "node host-b (8 CPU, 1 GPU) was stopped: idle; the cluster has 1 node left"
    ]


@pytest.mark.parametrize(
    ("workers", "awaited"),
    [
        ({"x": worker()}, None),
        (
            {"x": worker(WAITS, 0)},
            "1 captioning worker (1 GPU), for which no node has room, since T; scaling",
        ),
        ({"x": worker(LOADS)}, "1 captioning worker loading the model on host-a since T"),
        (
            {"x": worker(), "y": worker(LOADS, 8), "z": worker(WAITS, 0), "u": worker(WAITS, 0)},
            "1 captioning worker loading the model on host-a since T and 2 captioning workers (1 GPU), for "
            "which no node has room, since T; 1 at work; scaling",
        ),
        (
            {"x": worker(), "y": worker(WAITS, 0, stage="decoding")},
            "1 decoding worker (1 CPU), for which no node has room, since T; 1 at work; scaling",
        ),
        ({"x": worker(), "y": worker(stage="decoding"), "z": worker(WAITS, 0, stage="decoding")}, None),
    ],
)
def test_what_is_awaited_since_when_and_the_words_of_the_autoscaler(workers, awaited, monkeypatch):
    """A run for which no accelerator was available used to be silent."""
    monkeypatch.setattr(members_module, "at", lambda moment: "T")
    told = Told(monkeypatch, says="; scaling")
    told({"a": A}, **workers)
    assert told.members.awaited == awaited


@pytest.mark.parametrize(("is_local", "first_s"), [(False, 10), (True, 60)])
def test_a_wait_of_a_local_ray_is_said_only_when_it_is_long(is_local, first_s, monkeypatch):
    """The phases of the start report a loading model, which a local run used to repeat in several lines."""
    now, said = 0.0, []
    monkeypatch.setattr(members_module, "Reminder", functools.partial(Reminder, clock=lambda: now))
    told = Told(monkeypatch, is_local=is_local)
    for second in range(65):
        now = float(second)
        # workers are requested, then one loads the model before the other
        first, other = LOADS if second > 20 else WAITS, LOADS if second > 40 else WAITS
        said += [(second, line) for line in told({"a": A}, x=worker(first), y=worker(other))]
    assert said[0][0] == first_s and said[0][1].startswith("waiting for ")
    assert len(said) == 1 or not is_local


def actor(state: str, pid: int = 7, node: str = "a", reason: int | None = None) -> dict[str, Any]:
    """Return an actor as Ray lists it."""
    from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

    cause = None
    if reason is not None:
        cause = ActorDeathCause(actor_died_error_context=ActorDiedErrorContext(reason=reason))
    return {"State": state, "Pid": pid, "Address": {"NodeID": node}, "DeathCause": cause}


def test_states_of_ray_in_the_words_of_a_job():
    from ray.core.generated.common_pb2 import ActorDiedErrorContext as Died

    nodes = {"a": A, "b": LOST}
    assert state_of(actor("ALIVE"), nodes) == "runs"
    assert state_of(actor("PENDING_CREATION", 0), nodes) == "waits"
    assert state_of(actor("PENDING_CREATION"), nodes) == "loads"
    assert state_of(actor("RESTARTING"), nodes) == "loads"
    assert state_of(actor("RESTARTING", node="b"), nodes) == "waits"
    assert state_of(actor("DEAD", reason=Died.WORKER_DIED), nodes) == "died"
    assert state_of(actor("DEAD", reason=Died.RAY_KILL), nodes) is None
    assert state_of(actor("DEAD", reason=Died.OUT_OF_SCOPE), nodes) is None


def test_the_autoscaler_in_words_from_what_the_head_of_a_cluster_sends():
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    assert words_of(reply.SerializeToString()) == ""
    reply.autoscaling_state.infeasible_resource_requests.add().resources_bundle["GPU"] = 1.0
    pending = reply.autoscaling_state.pending_instance_requests.add()
    pending.ray_node_type_name, pending.count = "accelerator", 2
    assert words_of(reply.SerializeToString()) == (
        "; the autoscaler starts 2 accelerator; the autoscaler says that no node it may start has room for "
        "1 × 1 GPU"
    )


def test_the_autoscaler_in_words():
    launch = SimpleNamespace(count=2, ray_node_type_name="accelerator", details="no capacity")
    assert says([], [], [], []) == ""
    assert says([launch], [launch], [], []) == "; the autoscaler starts 3 accelerator"
    assert says([], [], [launch], []) == "; the autoscaler could not start accelerator: no capacity"
    unmet = [{"GPU": 1.0, "CPU": 0.5}, {"CPU": 0.5, "GPU": 1.0}]
    assert says([], [], [], unmet) == (
        "; the autoscaler says that no node it may start has room for 2 × 0.5 CPU and 1 GPU"
    )
