"""The endpoint over a `@serve.batch` deployment of transformers' `generate`, at the same loads."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from benchmarks.serve.command import ServeCommand
from benchmarks.serve.load import Load
from benchmarks.serve.processes import cpu_s_by_part
from benchmarks.sides.contender import Contender
from blip2_actor import EngineConfig, GenerationOptions
from pipeline import set_ray_environment

OFFERED = 0.8
"""Rate of arrivals, as a fraction of the rate that saturates `@serve.batch`."""
ROUTE = "/v1/caption"
ENDPOINT = "endpoint"

Runs = dict[str, dict[str, dict[str, Any]]]
"""Figures by load and side."""


def make_serve_batch(config: EngineConfig, options: GenerationOptions, is_passive: bool) -> Any:
    """Deploy `@serve.batch` from a contender's process, with the defaults of Ray and torch.

    Args:
        is_passive: make the model's threads wait without spinning, as the endpoint does.
    """
    set_ray_environment()  # before Ray is imported
    if is_passive:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from benchmarks.sides.serve_side import serve_batch

    return serve_batch(config, options)


class Comparison:
    """Rounds of both sides at the same loads."""

    def __init__(
        self,
        images: Sequence[bytes],
        callers: Sequence[int],
        batches: Sequence[int],
        seconds: float,
        *,
        is_passive: bool,
    ) -> None:
        """
        Args:
            images: encoded, sent in turn.
            callers: numbers of callers in closed loops.
            batches: sizes that `@serve.batch` may have.
            seconds: duration of one load.
            is_passive: as `make_serve_batch` has it.
        """
        self.rounds: list[Runs] = []
        self.saturated_per_s = 0.0
        """The highest rate of `@serve.batch` in the first round."""
        self._images, self._seconds = images, seconds
        self._loads = [Load(callers=number) for number in callers]
        self._batches = batches
        self._is_passive = is_passive

    def begin_round(self, config: EngineConfig, options: GenerationOptions) -> None:
        """Measure `@serve.batch`, at every load with every batch size that may be best."""
        runs: Runs = {}
        side = Contender(make_serve_batch, config, options, self._is_passive)
        url = side.call("url")
        root = psutil.Process(side.pid)
        self._warm_up(url)
        try:
            for load in self._loads:
                # A batch larger than the number of callers is never full, and waits for nothing.
                useful = [size for size in self._batches if not load.callers or size <= load.callers]
                for size in useful or [min(self._batches)]:
                    side.call("ask_replica", "set_max_batch_size", size)
                    self._offer(runs, load, f"serve.batch({size})", url, root)
                self._add_arrivals(runs, load)
        finally:
            side.call("shutdown")
            side.close()
        self.rounds.append(runs)

    def end_round(self, command: ServeCommand) -> None:
        """Measure the endpoint at the same loads."""
        self._warm_up(command.url + ROUTE)
        for load in self._loads:
            self._offer(self.rounds[-1], load, ENDPOINT, command.url + ROUTE, command.process)

    def result(self) -> dict[str, Any]:
        loads = {str(load): compare(self.rounds, str(load)) for load in self._loads}
        return {"saturated_per_s": self.saturated_per_s, "loads": loads}

    def _warm_up(self, url: str) -> None:
        Load(callers=max(load.callers for load in self._loads)).offer(url, self._images, self._seconds / 5)

    def _add_arrivals(self, runs: Runs, last: Load) -> None:
        """After the last closed loop of the first round, add arrivals at a share of the highest rate."""
        if self.saturated_per_s or last is not self._loads[-1]:
            return
        self.saturated_per_s = max(run["per_s"] for sides in runs.values() for run in sides.values())
        self._loads.append(Load(per_s=OFFERED * self.saturated_per_s))

    def _offer(self, runs: Runs, load: Load, name: str, url: str, root: psutil.Process) -> None:
        run = with_cpu_ms(root, lambda: load.offer(url, self._images, self._seconds))
        runs.setdefault(str(load), {})[name] = run
        show(f"{load!s:17} {name:16}", run)


def with_cpu_ms(root: psutil.Process, offer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a load, with each part's milliseconds of CPU time per answer."""
    before = cpu_s_by_part(root)
    run = offer()
    for part, used_s in cpu_s_by_part(root).items():
        run[f"{part}_cpu_ms"] = 1000 * (used_s - before[part]) / run["num_answers"]
    return run


def show(title: str, run: dict[str, Any]) -> None:
    shown = {key: round(value, 1) if isinstance(value, float) else value for key, value in run.items()}
    print(f"  {title}", shown, flush=True)


def compare(rounds: Sequence[Runs], load: str) -> dict[str, Any]:
    """Return the medians of the rounds, and the ratio of the endpoint to the best `@serve.batch`.

    The ratio is the median of each round's ratio.
    """
    sides: dict[str, dict[str, Any]] = {}
    for name in rounds[0][load]:
        found = [runs[load][name] for runs in rounds]
        rates = [run["per_s"] for run in found]
        numbers = [key for key, value in found[0].items() if isinstance(value, (int, float))]
        sides[name] = {key: statistics.median(run[key] for run in found) for key in numbers}
        sides[name]["errors"] = sum((Counter(run["errors"]) for run in found), Counter[str]())
        sides[name]["spread"] = (max(rates) - min(rates)) / statistics.median(rates)
    theirs = sides.keys() - {ENDPOINT}
    over_best = {}
    for key, better in (("per_s", max), ("p50_ms", min), ("p99_ms", min)):
        best = better(theirs, key=lambda name: sides[name][key])
        ratios = [runs[load][ENDPOINT][key] / runs[load][best][key] for runs in rounds]
        over_best[key] = statistics.median(ratios)
    return {"sides": sides, "endpoint_over_best": over_best}
