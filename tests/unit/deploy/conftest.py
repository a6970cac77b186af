"""Tests of the endpoint may be coroutines."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest

from tests.unit.deploy.routes.engine_service import EngineService


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in its own event loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="module", autouse=True)
def _close_services() -> Iterator[None]:
    """Close the services that the tests of a file have made, except those that a module made for itself."""
    EngineService.open_ones.clear()
    yield
    while EngineService.open_ones:
        EngineService.open_ones.pop().close()
