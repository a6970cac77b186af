"""The careful replay: how a captioning call runs again after its process has died.

The call runs alone in its process and in small steps, and tells the coordinator before each step which rows
it runs. If the process dies once more, the coordinator knows the step, and the rows of that step then run one
by one (see `coordinator`); a row that has died alone comes last. Rows that are already in fragments do not
run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from blip2_actor import Result, Status
from pipeline.rowset import RowSet
from pipeline.stages.caption import CaptionStage, FinishedRows
from pipeline.stages.coordinator import CallHistory
from pipeline.stages.row_result import RowResult

STEP_ROWS = 32
"""Rows that run together after their call has died once: few enough to finish soon, enough for a batch."""


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
    order = [*(p for p in positions if p not in history.suspects), *sorted(history.suspects & {*positions})]
    for step in steps(order, RowSet(history.run_alone)):
        if ray.get(coordinator.is_stopping.remote()):
            return
        if step[0] in history.failed:
            yield [(step[0], _failed())]
            continue
        ray.get(coordinator.begin_step.remote(call, step[0], step[-1] + 1))
        yield [row for piece in stage.finish_rows(table, step) for row in piece]


def steps(positions: Sequence[int], run_alone: RowSet) -> Iterator[list[int]]:
    """Yield runs of at most `STEP_ROWS` neighboring positions; those in `run_alone` come one by one."""
    step: list[int] = []
    for position in positions:
        is_full = len(step) == STEP_ROWS
        if step and (is_full or position in run_alone or position != step[-1] + 1):
            yield step
            step = []
        step.append(position)
        if position in run_alone:
            yield step
            step = []
    if step:
        yield step


def _failed() -> RowResult:
    error = "the captioning process died each time on this image alone"
    return RowResult(Result(status=Status.FAILED, error=error))
