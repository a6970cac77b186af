"""Calls to a replica without Serve's handshake, which costs a fifth of the CPU time of a request.

Serve makes each call a stream, whose first item says whether the replica has room: a proxy or a gateway that
has counted wrongly asks another replica. With one replica there is nothing to choose: a call is sent at once,
and calls beyond the limit of the replica wait at their caller, by its own count. If this replica has died
without its callers' knowledge, calls to it fail: a gateway then asks again, with the handshake, and the front
of a proxy answers 503. As soon as there is a second replica, as in an update, every call has the handshake.
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
    """Serve's own choice of a replica, and no handshake with the only one."""

    @property
    def asks_first(self) -> bool:
        """Whether a call has the handshake."""
        return has_handshake() or len(self.curr_replicas) > 1

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        return _DirectReplica(replica_info, self)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Keep our own count if replicas are called without the handshake, which would report theirs."""
        if self.asks_first:
            super().on_new_queue_len_info(replica_id, num_ongoing_requests)


class _DirectReplica(RunningReplica):
    """A replica that is called directly while it is the only one."""

    def __init__(self, replica_info: RunningReplicaInfo, router: DirectRouter) -> None:
        super().__init__(replica_info)
        self._router = router

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        if with_rejection and self._router.asks_first:
            return super().try_send_request(pr, with_rejection=True)
        result = super().try_send_request(pr, with_rejection=False)
        result.get_rejection_response = _accepted
        return result


async def _accepted() -> ReplicaQueueLengthInfo:
    return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)
