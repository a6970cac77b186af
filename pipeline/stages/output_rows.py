"""Finished rows as the output has them: exactly the columns of the row contract.

A row that cannot be written, because a value does not fit its column, costs no other row: it becomes a row
with the status `failed`, without its kept columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from blip2_actor import Result, Status
from pipeline.schema import IDENTITY, cast_to, output_schema
from pipeline.stages.caption import CaptionStage, FinishedRows
from pipeline.stages.row_result import RowResult

_DOES_NOT_FIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError, OverflowError)


def output_rows(
    table: pa.Table, finished: FinishedRows, kept: Sequence[str], stage: CaptionStage
) -> pa.Table:
    """Return finished rows with the columns of the output, in the order and with the types of the contract.

    Args:
        table: the table of the decode stage.
        finished: positions in it, with their results; at least one.
        kept: columns of the input that go into the output.
        stage: the stage that has made the results.
    """
    schema = _schema(table, kept, stage)
    return pa.concat_tables(_in_schema(table, finished, schema, stage))


def output_columns(rows: pa.Table, kept: Sequence[str], stage: CaptionStage) -> pa.Table:
    """Return rows that `CaptionStage` has made with exactly the columns of the output."""
    return _select(rows, _schema(rows, kept, stage))


def _schema(table: pa.Table, kept: Sequence[str], stage: CaptionStage) -> pa.Schema:
    kept_fields = (table.schema.field(name) for name in kept)
    return output_schema(kept_fields, stage.named, stage.captioned, "member" in table.column_names)


def _in_schema(
    table: pa.Table, finished: FinishedRows, schema: pa.Schema, stage: CaptionStage
) -> list[pa.Table]:
    try:
        rows = _select(stage.with_results(table, finished), schema)
        rows.validate(full=True)
        return [rows]
    except _DOES_NOT_FIT as error:
        if len(finished) == 1:
            return [_failed(table, finished[0][0], schema, stage, error)]
    half = len(finished) // 2
    return [
        part for some in (finished[:half], finished[half:]) for part in _in_schema(table, some, schema, stage)
    ]


def _failed(
    table: pa.Table, position: int, schema: pa.Schema, stage: CaptionStage, error: Exception
) -> pa.Table:
    reason = f"the row cannot be written: {error!a}"
    result = RowResult(Result(status=Status.FAILED, error=reason))
    rows = stage.with_results(table, [(position, result)])
    known = {*(field.name for field in IDENTITY), "status", "error", "flags"}
    return _select(rows.select([name for name in rows.column_names if name in known]), schema)


def _select(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the columns of a schema; those that are missing are null."""
    arrays = [
        cast_to(rows[field.name], field.type)
        if field.name in rows.column_names
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)
