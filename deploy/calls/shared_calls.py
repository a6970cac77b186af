"""Work that several requests wait for, whose calls do not end with the request that began it.

When a client leaves, Ray cancels all calls that its request has begun, and Serve cancels those that have no
replica yet (Ray 2.60). Both find them by the context of the request, which a new task inherits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import copy_context
from dataclasses import replace
from typing import Any, TypeVar

from ray import _raylet
from ray.serve import context as serve_context

T = TypeVar("T")


def begin_shared(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Begin work in a task with the caller, the record and the trace of this request, but not its end."""
    context = copy_context()
    context.run(_leave_request)
    return asyncio.get_running_loop().create_task(work, context=context)


def _leave_request() -> None:
    _raylet.async_task_id.set(None)  # type: ignore[attr-defined]
    request = serve_context._get_serve_request_context()
    serve_context._serve_request_context.set(replace(request, _internal_request_id=""))
