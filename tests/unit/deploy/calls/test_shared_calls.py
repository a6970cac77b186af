"""Work that several requests wait for belongs to none of them."""

from __future__ import annotations

import asyncio

from ray import _raylet
from ray.serve import context as serve_context

from deploy.calls.shared_calls import begin_shared
from deploy.guard.callers import CALLER, Caller


def test_shared_work_has_the_caller_and_not_the_task_of_its_request() -> None:
    """Ray and Serve would cancel its calls when the client of this one request disconnects."""

    async def look() -> tuple[object, str, str, str]:
        request = serve_context._get_serve_request_context()
        task = _raylet.async_task_id.get()  # type: ignore[attr-defined]
        return task, request._internal_request_id, request.request_id, CALLER.get().name

    async def request() -> None:
        CALLER.set(Caller(name="alice"))
        _raylet.async_task_id.set("task")  # type: ignore[attr-defined]
        serve_context._set_request_context(request_id="of client", _internal_request_id="of Serve")
        assert await look() == ("task", "of Serve", "of client", "alice")
        assert await begin_shared(look()) == (None, "", "of client", "alice")
        assert await look() == ("task", "of Serve", "of client", "alice")

    asyncio.run(request())
