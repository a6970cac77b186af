"""The batch job as a contender: each call is one run on its own local Ray, including its costs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

from benchmarks.sides.contender import Contender, peak_mib
from benchmarks.sides.memory_watch import watch_memory
from benchmarks.sides.steady_rate import steady_rate
from blip2_actor import EngineBuilder
from pipeline import CaptionSettings, Console, ProgressSnapshot, set_ray_environment


class ProgressRecorder(Console):
    """Records the progress instead of printing it."""

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


class StopAtFirstRows(ProgressRecorder):
    """Asks the job to stop as soon as its first rows are finished."""

    def show(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.num_rows and not self.seen:
            os.kill(os.getpid(), signal.SIGINT)
        super().show(snapshot)


class JobSide:
    """Run one job in this process, which becomes Ray's driver."""

    def __init__(self, started: float) -> None:
        """Prepare this process for Ray.

        Args:
            started: `time.time()` at which the command was given.
        """
        self._started = started
        set_ray_environment()

    def start(self, settings: CaptionSettings, engine: EngineBuilder) -> dict[str, float]:
        """Run a job until its first rows.

        Returns:
            Seconds from the command to the first rows, the driver's CPU seconds until it ended, and
            its memory.
        """
        from pipeline import prepare, run_job
        from pipeline.errors import StoppedBySignal

        offset = time.time() - time.monotonic()
        recorder = StopAtFirstRows()
        with contextlib.suppress(StoppedBySignal):
            run_job(prepare(settings, engine), recorder)
        return {
            "first_rows_s": recorder.seen[0][0] + offset - self._started,
            "driver_cpu_s": time.process_time(),
            "driver_peak_mib": peak_mib(),
        }

    def status(self, output: str) -> dict[str, float]:
        """Return the wall-clock and CPU seconds of the command `blip2 status`."""
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "pipeline", "status", output]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        return {"wall_s": time.monotonic() - began, "cpu_s": cpu_s}

    def run(self, settings: CaptionSettings, engine: EngineBuilder | None = None) -> dict[str, float]:
        """Run a job.

        Returns:
            Numbers of rows, rows per second in the steady state, seconds from the command to the first
            finished rows and to the end, and the growth of the driver's resident memory between the first
            rows and its peak.
        """
        from pipeline import prepare, run_job

        offset = time.time() - time.monotonic()
        recorder = ProgressRecorder()
        result = run_job(prepare(settings, engine), recorder)
        if result.missing:
            raise RuntimeError("; ".join(result.lines()))
        return {
            "num_rows": result.num_rows,
            "num_ok": result.num_ok,
            "rows_per_s": steady_rate(recorder.seen),
            "first_rows_s": recorder.seen[0][0] + offset - self._started,
            "total_s": time.time() - self._started,
            "driver_growth_mib": (recorder.peak_rss - recorder.first_rss) / 2**20,
        }

    def run_watched(self, settings: CaptionSettings, engine: EngineBuilder | None = None) -> dict[str, Any]:
        """Run a job as `run` does, and add the peak memory of its processes in MiB, by role."""
        with watch_memory() as by_role:
            run = self.run(settings, engine)
        return {**run, "peak_mib": dict(by_role)}


def call_job(method: str, *arguments: Any) -> Any:
    """Call a method of a `JobSide` in a fresh process; its times count from now."""
    side = Contender(JobSide, time.time())
    result = side.call(method, *arguments)
    side.close()
    return result
