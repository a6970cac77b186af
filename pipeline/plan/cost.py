"""What work costs: seconds by the clock, and seconds of CPU time of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Seconds of one worker, for a piece of work or for one row of it."""

    wall_s: float
    cpu_s: float

    def per_row(self, num_rows: int) -> Cost:
        return Cost(self.wall_s / num_rows, self.cpu_s / num_rows)


def measure(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Cost]:
    """Call a function, and return its result and what the call cost."""
    wall_start, cpu_start = perf_counter(), process_time()
    result = function(*args, **kwargs)
    return result, Cost(perf_counter() - wall_start, process_time() - cpu_start)
