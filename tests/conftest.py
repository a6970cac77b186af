"""What every test shares."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models lose more to a second thread than they gain, above all when other tests run beside."""
    import torch

    torch.set_num_threads(1)
