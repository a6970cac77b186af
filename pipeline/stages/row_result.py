"""`RowResult`: what was made of one image, and the columns that the results of many rows become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from blip2_actor import Result


@dataclass(slots=True)
class RowResult:
    """All outputs of one image. If one part could not be made, that part decides the status of the row."""

    result: Result
    """The caption; if no captions are made, only the status."""
    named: dict[str, str | float | np.ndarray] = field(default_factory=dict)
    """Answers, scores and vectors by the name of their column."""
    flags: list[str] = field(default_factory=list)
    """What the quality check found in the caption, and whether the image lacks its end."""


def columns_of(rows: Sequence[RowResult], named: Sequence[pa.Field]) -> dict[str, pa.Array]:
    """Convert rows to columns: every result column of the row contract, and the named columns."""
    results = [row.result for row in rows]
    best = [result.completions[0] if result.ok and result.completions else None for result in results]
    several = [
        result.completions if result.ok and len(result.completions) > 1 else None for result in results
    ]
    columns = {
        "caption": pa.array([one and one.text for one in best], pa.string()),
        "captions": pa.array([many and [c.text for c in many] for many in several], pa.list_(pa.string())),
        "logprobs": pa.array(
            [many and [c.logprob for c in many] for many in several], pa.list_(pa.float32())
        ),
        "logprob": pa.array([one and one.logprob for one in best], pa.float32()),
        "num_tokens": pa.array([one and len(one.token_ids) for one in best], pa.int32()),
        "finish_reason": pa.array([one and one.finish_reason for one in best], pa.string()),
        "flags": pa.array([row.flags for row in rows], pa.list_(pa.string())),
        "status": pa.array([result.status.value for result in results], pa.string()),
        "error": pa.array([result.error for result in results], pa.string()),
    }
    for column in named:
        values = [row.named.get(column.name) if row.result.ok else None for row in rows]
        # pyarrow takes lists of vectors, but no matrix.
        cells = [
            list(value) if isinstance(value, np.ndarray) and value.ndim == 2 else value for value in values
        ]
        columns[column.name] = pa.array(cells, column.type)
    return columns
