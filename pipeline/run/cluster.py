"""Joining a Ray cluster, or starting one on this machine, quietly."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.settings.placement import ClusterSize, Placement, reserve


def set_ray_environment() -> None:
    """Say what Ray reads from the environment while it is imported: call this before.

    The token of a fresh local cluster lives in the environment alone: the file that Ray would write to
    the home directory changes how later clusters start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core warns on every actor of Ray Data, past Python's logging, straight to the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A thread of Ray Data that outlives a stopped job must not start a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def connected() -> Iterator[ClusterSize]:
    """Be connected to Ray: a running connection, the cluster at RAY_ADDRESS, or a fresh local one.

    A local cluster ends with the block.
    """
    import ray

    from pipeline.run.worker_imports import OurPackagesFirst

    address = os.environ.get("RAY_ADDRESS")
    already = ray.is_initialized()
    if not already:
        with _silent_stderr():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else {"include_dashboard": False, "job_config": OurPackagesFirst()}),
            )
    try:
        quiet_ray_data()
        yield size_of_cluster()
    finally:
        if not already:
            ray.shutdown()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's core writes to the terminal while it starts; its errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def info_where_it_runs(engine: EngineBuilder, info: ModelInfo, placement: Placement) -> ModelInfo:
    """What the machines that will caption find the model to be.

    The driver of a cluster often has no accelerator, and "auto" would stand for another dtype there.
    """
    if not os.environ.get("RAY_ADDRESS") or getattr(engine, "dtype", None) != "auto":
        return info
    import ray

    with connected() as cluster:
        num_gpus = reserve(placement, cluster).caption_gpus
        if not num_gpus:
            return info
        return ray.get(ray.remote(num_cpus=0, num_gpus=num_gpus)(_info).remote(engine))


def _info(engine: EngineBuilder) -> ModelInfo:
    return engine.info()


def quiet_ray_data() -> None:
    """Keep Ray Data's plans, bars and tracebacks off the terminal; its own log file has them."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler) and isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def size_of_cluster() -> ClusterSize:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterSize(
        num_cpus=sum(node.get("CPU", 0.0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0.0) for node in nodes),
        cpus_per_node=max((node.get("CPU", 0.0) for node in nodes), default=0.0),
    )
