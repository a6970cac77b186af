"""The bottleneck: which stage limited the speed of the run, and what would help."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.attempts.attempt import STAGES, WorkerLoad

BUSY = 0.7
"""A stage is the bottleneck from this busy fraction on."""
MIN_STEADY_S = 60.0
"""Less work than this says nothing about a bottleneck: the queues between the stages are still filling."""
TOO_SHORT = f"bottleneck: unknown; a run must work for {MIN_STEADY_S:.0f} s to show it"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a job runs on, and how much of it the stages use."""

    num_cpus: float
    num_accelerators: float
    num_workers: Mapping[str, float]
    """Number of workers, by stage."""

    def remedy(self, stage: str) -> str:
        """Return what makes a stage faster. More workers are advised only if there is hardware for them."""
        workers = round(self.num_workers.get(stage, 1))
        if stage == "caption" and workers < self.num_accelerators:
            return f"more captioning actors (--max-actors, up to {self.num_accelerators:,.0f}) would help"
        if stage == "caption":
            return "a faster device or more machines would help"
        if stage == "decode" and workers < self.num_cpus:
            return (
                f"more decoding actors (--max-decode-actors, up to {self.num_cpus:,.0f}) or "
                "--image-jpeg-draft would help"
            )
        if stage == "decode":
            return "more CPUs or --image-jpeg-draft would help"
        if stage == "write":
            return "a faster store for the output would help"
        return "a faster store for the input, or more and smaller shards, would help"


class WorkerLoads:
    """Stops the clocks of workers that are gone; the coordinator takes them for idle ones."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], WorkerLoad] = {}

    def stop_gone(
        self, loads: Mapping[str, Mapping[str, WorkerLoad]], at_work: Collection[str]
    ) -> dict[str, dict[str, WorkerLoad]]:
        """Return the loads; the load of a worker that is gone stays as it was when it was first missed.

        Args:
            loads: by stage and worker.
            at_work: the workers that are there. None may be known before the first and after the last row.
        """
        if at_work:
            self._last = {
                (stage, worker): self._last.get((stage, worker), load)
                for stage, of in loads.items()
                for worker, load in of.items()
                if worker not in at_work
            }
        return {
            stage: {worker: self._last.get((stage, worker), load) for worker, load in of.items()}
            for stage, of in loads.items()
        }


def busy_fractions(loads: Mapping[str, Mapping[str, WorkerLoad]]) -> dict[str, float]:
    """Return the busy fraction of each stage: busy seconds over alive seconds of all its workers together."""
    fractions = {}
    for stage in STAGES:
        workers = loads.get(stage, {}).values()
        alive_s = sum(load.alive_s for load in workers)
        if alive_s:
            fractions[stage] = min(1.0, sum(load.busy_s for load in workers) / alive_s)
    return fractions


def describe_bottleneck(busy: Mapping[str, float], steady_s: float, machines: Machines) -> str:
    """Return one sentence. Reading is not measured: it is the bottleneck when no other stage is busy.

    Args:
        busy: busy fraction by stage.
        steady_s: seconds of work, without the start.
        machines: what the job ran on.
    """
    if not busy or steady_s < MIN_STEADY_S:
        return TOO_SHORT
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < BUSY:
        shown = ", ".join(f"{name} {part:.0%}" for name, part in busy.items())
        return f"bottleneck: reading, no later stage was busy ({shown}); {machines.remedy('read')}"
    return f"bottleneck: {stage}, busy {busy[stage]:.0%} of the time; {machines.remedy(stage)}"
