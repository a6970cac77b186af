"""Settings that all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: a second one slows tiny models down, above all if other tests run at the same time."""
    import torch

    torch.set_num_threads(1)
