"""Calls without Serve's handshake: which replica is asked, and what is counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import RunningReplica

from deploy.app import CAPTIONER, GATEWAY
from deploy.calls.direct_calls import DirectRouter
from deploy.calls.handshake import handshake


class Sent:
    """The result of a call, as Serve's router has it."""


def test_proxies_and_gateways_call_replicas_directly() -> None:
    for deployment in (CAPTIONER, GATEWAY):
        config = deployment._deployment_config.request_router_config
        assert config.get_request_router_class().__name__ == DirectRouter.__name__  # pickled by value


def test_a_call_of_the_only_replica_has_no_handshake_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def send(_: RunningReplica, __: object, with_rejection: bool) -> Sent:
        asked.append(with_rejection)
        return Sent()

    monkeypatch.setattr(RunningReplica, "__init__", lambda *_: None)
    monkeypatch.setattr(RunningReplica, "try_send_request", send)
    info: Any = None

    async def call() -> None:
        deployment = DeploymentID("Captioner")
        router = DirectRouter(
            deployment_id=deployment,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
        )
        replica_id = ReplicaID("r", deployment)
        result = router.create_replica_wrapper(info).try_send_request(info, with_rejection=True)
        router.on_send_request(replica_id)
        router.on_send_request(replica_id)
        with handshake():
            router.create_replica_wrapper(info).try_send_request(info, with_rejection=True)
        assert not router.asks_first
        answer = await result.get_rejection_response()
        assert answer is not None and answer.accepted
        router.on_new_queue_len_info(replica_id, answer.num_ongoing_requests)
        assert router.replica_queue_len_cache.get(replica_id) == 2  # calls that this process has sent
        router._replicas = dict.fromkeys([replica_id, ReplicaID("another", deployment)], info)
        router.create_replica_wrapper(info).try_send_request(info, with_rejection=True)
        router.on_new_queue_len_info(replica_id, 5)
        assert router.replica_queue_len_cache.get(replica_id) == 5  # the replica's own number

    asyncio.run(call())
    assert asked == [False, True, True]
