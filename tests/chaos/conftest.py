"""The environment that every process of a chaos test inherits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    """Keep these clusters apart from any other Ray of this machine. Sockets need the path to be short."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_TMPDIR=folder)
        yield
    os.environ.clear()
    os.environ.update(before)
