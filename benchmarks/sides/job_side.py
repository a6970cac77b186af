"""The batch job as a contender: one run per call, on a local Ray of its own, with what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from blip2_actor import EngineBuilder
from pipeline.progress import Console, ProgressSnapshot
from pipeline.run.cluster import set_ray_environment
from pipeline.settings.settings import CaptionSettings

START, END = 0.15, 0.9
"""The steady state: between these parts of the rows; before is start-up, after it the tail."""


@dataclass(frozen=True)
class JobRun:
    """Seconds are wall time."""

    num_rows: int
    num_ok: int
    rows_per_s: float
    """In the steady state."""
    first_rows_s: float
    """From the call, Ray's start and the model's load included, to the first finished rows."""
    total_s: float
    driver_growth_mib: float
    """How much the driver's resident memory grew from the first finished rows to its peak."""


class Watch(Console):
    """Takes a note of every bit of progress instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int]] = []
        self.first_rss = self.peak_rss = 0
        self._process = psutil.Process()

    def wants_progress(self) -> bool:
        return True

    def say(self, text: str = "") -> None:
        pass

    def show(self, snapshot: ProgressSnapshot) -> None:
        if not snapshot.num_rows or (self.seen and self.seen[-1][1] == snapshot.num_rows):
            return
        self.seen.append((time.monotonic(), snapshot.num_rows))
        rss = self._process.memory_info().rss
        self.first_rss, self.peak_rss = self.first_rss or rss, max(self.peak_rss, rss)


def steady_rate(seen: Sequence[tuple[float, int]]) -> float:
    """Rows per second in the steady state, of moments and how many rows were finished then; 0 for too few."""
    total = seen[-1][1]
    first = next(point for point in seen if point[1] >= START * total)
    last = [point for point in seen if point[1] <= END * total or point is first][-1]
    return (last[1] - first[1]) / (last[0] - first[0]) if last is not first else 0.0


class JobSide:
    """Runs jobs in this process, which becomes Ray's driver."""

    def __init__(self, started: float) -> None:
        """`started` is when the command was given, as `time.time()` of this machine."""
        self._started = started
        set_ray_environment()

    def run(self, settings: CaptionSettings, engine: EngineBuilder | None = None) -> dict[str, float]:
        """A `JobRun` as plain values; the first run of the process counts from the command."""
        from pipeline.run.prepare import prepare
        from pipeline.run.run_job import run_job

        began, self._started = self._started or time.time(), 0.0
        offset = time.time() - time.monotonic()
        watch = Watch()
        result = run_job(prepare(settings, engine), watch)
        if result.missing:
            raise RuntimeError("; ".join(result.lines()))
        run = JobRun(
            num_rows=result.num_rows,
            num_ok=result.num_ok,
            rows_per_s=steady_rate(watch.seen),
            first_rows_s=watch.seen[0][0] + offset - began,
            total_s=time.time() - began,
            driver_growth_mib=(watch.peak_rss - watch.first_rss) / 2**20,
        )
        return asdict(run)
