"""What only a worker knows: which dtype "auto" means on the device that captions.

The driver of a cluster often has no accelerator. It describes the model without a device, and the first
worker that has what an actor reserves is asked for the dtype. The answer is recorded with the run, and later
starts take the recorded one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ray

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.errors import RefusedByCluster, Stopped
from pipeline.placement.own_accelerator import use_own_accelerator
from pipeline.placement.reservations import Reservations, resolve_engine
from pipeline.watch.waiting import Say, wait_for

AUTO = "auto"


def leaves_dtype_open(engine: EngineBuilder) -> bool:
    """Return whether the device decides on the dtype."""
    return getattr(engine, "dtype", None) == AUTO


def with_dtype(engine: EngineBuilder, dtype: str) -> EngineBuilder:
    """Return the engine with a dtype, if it leaves that open."""
    known: Any = engine
    return dataclasses.replace(known, dtype=dtype) if leaves_dtype_open(engine) else engine


def describe_without_device(engine: EngineBuilder) -> ModelInfo:
    """Describe the model on a machine that does not run it; an open dtype is that of this machine's CPU.

    Raises:
        ValueError, OSError: as from `EngineConfig.info`.
    """
    known: Any = engine
    if not {"device", "dtype"} <= {each.name for each in dataclasses.fields(known)}:
        return engine.info()
    if leaves_dtype_open(engine):
        return dataclasses.replace(known, device="cpu").info()
    info = dataclasses.replace(known, device="cpu", dtype="float32").info()
    return dataclasses.replace(info, dtype=known.dtype)


def ask_first_worker(engine: EngineBuilder, reservations: Reservations, say: Say) -> ModelInfo:
    """Return the model as the first worker with the reservation of an actor sees it; wait for that worker.

    Raises:
        RefusedByCluster: the worker cannot run the model, for example as torch cannot use its accelerator.
        Stopped: the worker has failed for another reason.
    """
    caption = reservations.caption
    options = caption.options
    task = ray.remote(_describe).options(**options)
    answer = task.remote(resolve_engine(engine, reservations), caption.accelerators)
    try:
        return wait_for(answer, f"the first captioning worker ({caption})", say)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise RefusedByCluster(str(error.cause)) from error
        raise Stopped(f"the first captioning worker has failed: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise Stopped(f"the first captioning worker has failed: {error}") from error


def _describe(engine: EngineBuilder, accelerators: Mapping[str, float]) -> ModelInfo:
    use_own_accelerator(engine, accelerators)
    return engine.info()
