"""The careful replay: how a captioning call runs again after its process has died.

The call runs alone in its process and in small steps, and tells the coordinator before each step which rows
it runs. If the process dies once more, the coordinator knows the step, and the rows of that step then run one
by one (see `coordinator`); a row that has died alone comes last. Rows that are already in fragments do not
run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from blip2_actor import Result, Status
from pipeline.stages.caption import CaptionStage, FinishedRows
from pipeline.stages.coordinator import MAX_DEATHS_ALONE, CallHistory
from pipeline.stages.row_result import RowResult

STEP_ROWS = 32
"""Rows that run together after their call has died once: few enough to finish soon, but still a batch."""


def replay(
    stage: CaptionStage,
    table: pa.Table,
    positions: Sequence[int],
    call: str,
    history: CallHistory,
    coordinator: Any,
) -> Iterator[FinishedRows]:
    """Caption rows of a table in small steps; yield the rows of each step. The caller reports what it wrote.

    Args:
        positions: the rows that are not finished, in ascending order.
        call: the name of the call, by which the coordinator knows it.
        coordinator: handle of the job's `Coordinator` actor; when it is stopping, no further step begins.
    """
    for step in steps(positions, history.deaths_alone):
        if ray.get(coordinator.is_stopping.remote()):
            return
        if history.deaths_alone.get(step[0], 0) >= MAX_DEATHS_ALONE:
            yield [(step[0], _failed())]
            continue
        ray.get(coordinator.begin_step.remote(call, step))
        yield [row for piece in stage.finish_rows(table, step) for row in piece]


def steps(positions: Sequence[int], deaths_alone: Mapping[int, int]) -> Iterator[Sequence[int]]:
    """Yield the positions that run together.

    Rows that must run alone but have not died alone come first. Then come the rows that are not in
    `deaths_alone`, `STEP_ROWS` at a time. Rows that have died alone come last: until then, another row may
    show that the device works.
    """
    yield from ([position] for position in positions if deaths_alone.get(position) == 0)
    together = [position for position in positions if position not in deaths_alone]
    yield from (together[start : start + STEP_ROWS] for start in range(0, len(together), STEP_ROWS))
    yield from ([position] for position in positions if deaths_alone.get(position, 0) > 0)


def _failed() -> RowResult:
    error = "the captioning process died each time on this image alone"
    return RowResult(Result(status=Status.FAILED, error=error))
