"""The driver's work for every shard before the first row is read, without Ray and without a model."""

# ruff: noqa: E402 -- Ray reads its environment when it is imported, which most of these imports do.
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from pipeline import CaptionSettings, set_ray_environment

set_ray_environment()

from ray import cloudpickle

from benchmarks.sides.contender import peak_mib
from pipeline.inputs.datasource import ShardDatasource
from pipeline.inputs.listing import list_input
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import begin_run
from pipeline.report.status import RunStatus
from pipeline.run.tracker import Tracker
from pipeline.settings.fingerprint import Fingerprint
from pipeline.stages.coordinator import report_shard
from pipeline.storage.folder import Folder


class DriverBooks:
    """Do each part once, and record its wall-clock and CPU seconds."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, float]] = {}

    def begin(self, settings: CaptionSettings) -> None:
        """List an input, begin its run, and make the read tasks."""
        with self._part("list"):
            listing = list_input(settings.input)
        ledger = Ledger(Folder(settings.output))
        with self._part("begin"):
            run = begin_run(Fingerprint({}), settings, listing, None)
            ledger.begin(run)
        with self._part("sweep"):
            left = ledger.unfinished(run, ledger.sweep(run, ledger.scan(), {}))
            Tracker(left)
        with self._part("read_tasks"):
            work = [progress.work for progress in left]
            source = ShardDatasource(work, settings.read_options, partial(report_shard, None, ledger.folder))
            for task in source.get_read_tasks(source.num_tasks):
                cloudpickle.dumps(task)

    def resume(self, settings: CaptionSettings) -> None:
        """Start the run again."""
        ledger = Ledger(Folder(settings.output))
        with self._part("resume"):
            run = ledger.require_run(settings.input)
            ledger.compare_input(run, settings.input)
            Tracker(ledger.unfinished(run, ledger.sweep(run, ledger.scan(), {})))

    def status(self, output: str) -> None:
        """Make the lines of `blip2 status`."""
        with self._part("status"):
            RunStatus.read(output).lines()

    def parts(self) -> dict[str, dict[str, float]]:
        """Return the seconds of each part."""
        return self._parts

    def peak_mib(self) -> float:
        return peak_mib()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self._parts[name] = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
