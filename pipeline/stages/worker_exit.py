"""How a worker process that holds an engine or decoding processes exits."""

from __future__ import annotations

import atexit
import os

import ray


def exit_without_destructors() -> None:
    """Make the process of this Ray actor exit without the destructors of Ray's core.

    These sometimes wait for themselves (Ray 2.60: `CoreWorkerProcess::HandleAtExit` posts to a scheduler that
    is shutting down). The process would then never end, and would keep its memory and its accelerator. Ray
    already knows at that point that the actor has ended. Outside an actor this does nothing.
    """
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        atexit.register(os._exit, 0)
