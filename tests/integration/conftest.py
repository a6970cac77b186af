"""One local Ray for the whole test session: starting it is the slowest part of these tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.small_ray import small_ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start Ray with two CPUs and a small object store, apart from any other Ray of this machine."""
    from deploy.app import NODE_ENVIRONMENT

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.update(NODE_ENVIRONMENT)  # the processes of the endpoint inherit it
    # A short path: those of Ray's sockets may have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        with small_ray(num_cpus=2):
            yield
