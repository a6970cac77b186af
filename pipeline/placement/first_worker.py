"""What only a worker knows: which dtype "auto" means on the device that captions, and what it quantizes.

The driver of a cluster often has no accelerator. It describes the model without a device, and the first
worker that has what an actor reserves is asked for the dtype. It also measures which parts of the model are
quantized, so that all workers quantize the same parts. The answer is recorded with the run, and later starts
take the recorded one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from blip2_actor import EngineBuilder, ModelInfo, QuantizationChoice
from pipeline.errors import RefusedByCluster, Stopped
from pipeline.placement.own_accelerator import use_own_accelerator
from pipeline.placement.reservations import Reservations, resolve_engine
from pipeline.watch.waiting import Say, wait_for

AUTO = "auto"


@dataclass(frozen=True)
class WorkerAnswer:
    """What the first worker has found."""

    info: ModelInfo
    quantization: QuantizationChoice | None
    """None if the engine does not quantize."""


def leaves_dtype_open(engine: EngineBuilder) -> bool:
    """Return whether the device decides on the dtype."""
    return getattr(engine, "dtype", None) == AUTO


def leaves_quantization_open(engine: EngineBuilder) -> bool:
    """Return whether a measurement decides which parts are quantized."""
    is_wanted = getattr(engine, "quantize", None) is not None
    return is_wanted and getattr(engine, "quantization_choice", None) is None


def as_answered(engine: EngineBuilder, dtype: str, choice: QuantizationChoice | None) -> EngineBuilder:
    """Return the engine with what a worker has answered, or a run has recorded, of what it leaves open.

    Args:
        choice: what is quantized; None, or of another method, leaves that open.
    """
    known: Any = engine
    if leaves_dtype_open(engine):
        known = dataclasses.replace(known, dtype=dtype)
    if choice is not None and choice.method == getattr(known, "quantize", None):
        known = dataclasses.replace(known, quantization_choice=choice)
    return known


def describe_without_device(engine: EngineBuilder) -> ModelInfo:
    """Describe the model on a machine that does not run it; an open dtype is that of this machine's CPU.

    Raises:
        ValueError, OSError: as from `EngineConfig.info`.
    """
    known: Any = engine
    if not {"device", "dtype"} <= {each.name for each in dataclasses.fields(known)}:
        return engine.info()
    dtype = known.dtype
    known = dataclasses.replace(known, device="cpu", **({} if dtype == AUTO else {"dtype": "float32"}))
    if (quantize := getattr(known, "quantize", None)) is not None:  # only its device knows if it can
        known = dataclasses.replace(known, quantize=None, quantization_choice=None)
    info = dataclasses.replace(known.info(), quantize=quantize)
    return info if dtype == AUTO else dataclasses.replace(info, dtype=dtype)


def ask_first_worker(engine: EngineBuilder, reservations: Reservations, say: Say) -> WorkerAnswer:
    """Return what the first worker with the reservation of an actor finds; wait for that worker.

    Raises:
        RefusedByCluster: the worker cannot run the model, for example as torch cannot use its accelerator.
        Stopped: the worker has failed for another reason.
    """
    caption = reservations.caption
    task = ray.remote(_answer).options(**caption.options)
    answer = task.remote(resolve_engine(engine, reservations), caption.accelerators)
    try:
        return wait_for(answer, f"the first captioning worker ({caption})", say)
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(cause, ValueError):
            raise RefusedByCluster(str(cause)) from error
        raise Stopped(f"the first captioning worker has failed: {cause}") from error


def _answer(engine: EngineBuilder, accelerators: Mapping[str, float]) -> WorkerAnswer:
    use_own_accelerator(engine, accelerators)
    known: Any = engine
    choice = known.choose_quantization() if leaves_quantization_open(engine) else None
    return WorkerAnswer(engine.info(), choice)
