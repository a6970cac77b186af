"""A Ray of one machine with a small object store, for tests that need no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_ray(num_cpus: int) -> Iterator[None]:
    """Start Ray in the current environment; end it after the block."""
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
