"""Settings that all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: a second one slows tiny models down, above all if other tests run at the same time."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Split the tests that need Ray between two workers of pytest-xdist, each with one local Ray."""
    for item in items:
        if "tests/integration/" in item.nodeid:
            group = "job" if "tests/integration/job/" in item.nodeid else "integration"
            item.add_marker(pytest.mark.xdist_group(group))
