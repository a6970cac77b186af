"""A row under way, what became of it, and the columns that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from blip2_actor import ImageLike, Result

Pending = Future[Result] | Result


@dataclass(slots=True)
class PendingRow:
    """A row between its requests and what becomes of them."""

    position: int
    """In its table."""
    pending: list[Pending]
    """The caption, where one is made, and the answers in the order of the asks."""
    prompt: str | None = None
    image: ImageLike | None = None
    """Where more is to be made of it when the texts are there."""
    identity: tuple[object, ...] = ()
    """The same for identical images, where they are looked for."""
    results: list[Result] = field(default_factory=list)
    """Of the requests, once they are done."""


@dataclass(slots=True)
class RowResult:
    """Everything that was asked of one image; one part that could not be made decides the status."""

    result: Result
    """The caption; without captions the status alone."""
    named: dict[str, str | float | np.ndarray] = field(default_factory=dict)
    """Answers, scores and vectors by the name of their column."""
    flags: list[str] = field(default_factory=list)
    """What the guard says of the caption."""


def columns_of(made: Sequence[RowResult], named: Sequence[pa.Field]) -> dict[str, pa.Array]:
    """The result columns of rows, all of the contract's, and those that the user has named."""
    results = [one.result for one in made]
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
        "flags": pa.array([one.flags for one in made], pa.list_(pa.string())),
        "status": pa.array([result.status.value for result in results], pa.string()),
        "error": pa.array([result.error for result in results], pa.string()),
    }
    for column in named:
        values = [one.named.get(column.name) if one.result.ok else None for one in made]
        is_vector = pa.types.is_fixed_size_list(column.type)
        columns[column.name] = (
            fixed_lists(values, column.type) if is_vector else pa.array(values, column.type)  # type: ignore[arg-type]
        )
    return columns


def fixed_lists(vectors: Sequence[np.ndarray | None], type: pa.DataType) -> pa.Array:
    """Vectors of one shape as fixed-size lists, nested where they are matrices; null where there is none."""
    shape = []
    inner = type
    while pa.types.is_fixed_size_list(inner):
        shape.append(inner.list_size)
        inner = inner.value_type
    values = np.zeros((len(vectors), *shape), np.float32)
    for row, vector in enumerate(vectors):
        if vector is not None:
            values[row] = vector
    array: pa.Array = pa.array(values.ravel())
    for size in reversed(shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    missing = pa.array([vector is None for vector in vectors], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(array, shape[0], mask=missing)
