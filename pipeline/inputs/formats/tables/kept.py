"""The types of kept columns: one type each in all files of an output, so that they read as one table.

A shard alone does not know it: its table may lack the column, hold nothing but nulls, or have smaller
integers than the next one. So the types are found before the run begins, and stored with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.reader import Tables
from pipeline.schema import plain_type


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """Return the plain type that holds the values of both types, or None if there is none."""
    fields = [pa.schema([pa.field("", plain_type(type))]) for type in (first, second)]
    try:
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def join_fields(name: str, found: Iterable[tuple[str, pa.DataType]]) -> pa.Field:
    """Return the field of a kept column that several files have.

    Args:
        name: the column's name in the output.
        found: each file, and the type that the column has there.

    Raises:
        InputError: no type holds the values of all files.
    """
    joined, from_file = pa.null(), ""
    for file, type in found:
        both = common_type(joined, type)
        if both is None:
            raise InputError(
                f"keep must name columns with one type in all files, got {name!r} of type {joined} in "
                f"{from_file} and {type} in {file}; write it with one type, or leave it out"
            )
        if both != joined:
            joined, from_file = both, file
    return pa.field(name, joined)


def with_types(reader: Tables, kept: pa.Schema) -> Tables:
    """Yield the tables of a reader with its kept columns in the types of the output.

    A column of a type that does not fit is null, and the report says so.
    """
    notes: dict[str, None] = {}
    while True:
        try:
            table = next(reader)
        except StopIteration as end:
            report = end.value
            break
        for field in kept:
            index = table.column_names.index(field.name)
            column = table.column(index)
            if common_type(field.type, column.type) == field.type:
                column = column.cast(field.type, safe=False)
            elif column.type != field.type:
                found = f"it has the type {column.type}, and the output {field.type}"
                notes[f"the column {field.name!r} is null, because {found}"] = None
                column = pa.nulls(len(table), field.type)
            table = table.set_column(index, field, column)
        yield table
    if not notes:
        return report
    return replace(report, note="; ".join([*filter(None, [report.note]), *notes]))
