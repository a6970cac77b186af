"""How Ray Data runs the stages: in which pool of actors, with which blocks, reserving which resources."""

from __future__ import annotations

from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from pipeline.placement.reservations import Reservations
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.placement import Placement
from pipeline.stages.decode import DecodeStage

CALL_ROWS = 256
"""Rows of one captioning call on accelerators. Eight such calls at the same time keep the slots of an engine
full."""
BLOCK_ROWS = 512
"""Maximum number of rows of a block of pixels, and so of a call on CPUs; only those of small images have so
many. A block costs the driver and Ray 20 ms, whatever its size: with an engine that costs nothing, a job
makes 4,500 to 4,950 rows/s, and 3,800 to 4,300 with half as many (two cores, 2026-11-27)."""


def decode(
    ds: Dataset,
    spec: CaptionSpec,
    size_px: int,
    reservations: Reservations,
    *,
    keeps_image: bool = False,
    coordinator: Any = None,
) -> Dataset:
    """Apply the decode stage to a dataset, in a pool that grows and shrinks.

    Args:
        size_px: image size of the model.
        keeps_image: whether the column with the encoded image stays.
        coordinator: handle of the job's `Coordinator` actor, which is told how busy each worker was.
    """
    return ds.map_batches(
        DecodeStage,
        fn_constructor_args=(size_px, spec.limits, spec.image_column),
        fn_constructor_kwargs={"keeps_image": keeps_image, "fetch": spec.fetch, "coordinator": coordinator},
        # Whole blocks: with a number, Ray would join the blocks of several shards to reach it.
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=reservations.max_decode_actors),
        **reservations.decode.options,
    )


def caption_pool(placement: Placement, reservations: Reservations) -> dict[str, Any]:
    """Return the arguments with which `map_batches` runs a captioning stage: several calls at once per actor.

    On CPUs a call takes one block. With GPUs Ray requires a number of rows, and joins blocks to reach
    it.
    """
    return {
        "batch_size": CALL_ROWS if reservations.caption.accelerators.get("GPU") else None,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(
            min_size=reservations.min_actors,
            max_size=reservations.max_actors,
            max_concurrent_calls_per_actor=placement.calls_per_actor,
            enable_true_multi_threading=True,
        ),
        **reservations.caption.options,
    }
