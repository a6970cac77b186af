"""Calls to a replica without Serve's handshake, which costs a fifth of the CPU time of a request.

Serve makes each call a stream, whose first item says whether the replica has room: a proxy or a gateway that
has counted wrongly asks another replica. Here it counts what it has sent itself, and a replica has a request
beyond its limit wait. A replica that has died without its callers' knowledge fails the calls that it gets: a
gateway asks again then, with the handshake, and the front of a proxy answers 503.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.serve._private.common import ReplicaQueueLengthInfo, RunningReplicaInfo
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from deploy.calls.handshake import has_handshake

if TYPE_CHECKING:
    from ray.serve._private.replica_result import ReplicaResult


class DirectRouter(PowerOfTwoChoicesRequestRouter):
    """Serve's own choice of a replica, by what this process has sent to each."""

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        return _DirectReplica(replica_info)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Keep the own count: a replica that is not asked first says nothing."""


class _DirectReplica(RunningReplica):
    """A replica that takes every request; one beyond its limit waits there."""

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        if with_rejection and has_handshake():
            return super().try_send_request(pr, with_rejection=True)
        result = super().try_send_request(pr, with_rejection=False)
        result.get_rejection_response = _accepted
        return result


async def _accepted() -> ReplicaQueueLengthInfo:
    return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)
