"""How a worker that holds an engine or decoding children ends."""

from __future__ import annotations

import atexit
import os

import ray


def end_without_ceremony() -> None:
    """Let this actor's process, once its work is over, end without the destructors of Ray's core.

    They wait for themselves now and then (Ray 2.60: `CoreWorkerProcess::HandleAtExit` posts to a scheduler
    that is shutting down), and a process that stays for ever keeps its memory and its accelerator. Ray
    has been told of the end by then. Does nothing outside an actor.
    """
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        atexit.register(os._exit, 0)
