"""`blip2 plan --on-cluster`: make the plan in one worker that reserves what a captioning actor reserves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.errors import RefusedByCluster, Stopped
from pipeline.run.cluster import connected, is_cluster, set_ray_environment
from pipeline.settings.plan_settings import AnyPlanSettings

ON_CLUSTER = "its node"
"""What a plan calls the machine that was measured."""

if TYPE_CHECKING:
    from blip2_actor import EngineBuilder
    from pipeline.plan.model import Plan
    from pipeline.watch.waiting import Say


def make_plan_on_cluster(settings: AnyPlanSettings, engine: EngineBuilder | None, say: Say) -> Plan:
    """Wait for a worker of the cluster at RAY_ADDRESS, and return the plan that it makes.

    Args:
        settings: the job, and the size of the sample.
        engine: used in place of the job's engine.
        say: prints a line for people, such as what is awaited.

    Raises:
        ValueError, OSError: the job would raise it too, or no image of the sample can be decoded.
        RefusedByCluster: no cluster is named, or none of its nodes has what an actor reserves.
        RayStartFailed: the cluster cannot be reached.
        Stopped: the worker has died.
    """
    if not is_cluster():
        raise RefusedByCluster(
            "on_cluster needs the address of a cluster in RAY_ADDRESS, and it is not set; set it, send the "
            "command to the cluster with blip2 submit, or leave --on-cluster out to measure this machine"
        )
    set_ray_environment()
    import ray

    from pipeline.placement.reservations import reserve, resolve_engine
    from pipeline.placement.storage_check import refuse_relative
    from pipeline.watch.waiting import wait_for

    refuse_relative("input", settings.input)
    job = settings.job()  # It looks at the deadline, which may be over when the cluster answers.
    with connected() as cluster:
        engine = engine or job.builder
        reservations = reserve(job.placement, cluster, engine)
        caption = reservations.caption
        task = ray.remote(_make_plan).options(max_retries=0, **caption.options)
        answer = task.remote(settings, resolve_engine(engine, reservations), caption.accelerators)
        try:
            return wait_for(answer, f"a captioning worker ({caption}) and its measurements", say)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise Stopped(f"the worker that measures has died: {error}") from error


def _make_plan(settings: AnyPlanSettings, engine: EngineBuilder, accelerators: Mapping[str, float]) -> Plan:
    """Make a plan in a worker of Ray."""
    from pipeline.placement.own_accelerator import use_own_accelerator
    from pipeline.plan.make_plan import make_plan

    use_own_accelerator(engine, accelerators)
    return dataclasses.replace(make_plan(settings, engine), place=ON_CLUSTER)
