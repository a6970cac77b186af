"""The types of kept columns: one type each in all files of an output, so that they read as one table.

One shard does not show the type: its table may lack the column, hold only nulls, or have smaller integers
than the next one. So the types are found before the run begins, and stored with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.formats.tables.texts import valid_texts
from pipeline.inputs.reader import Tables
from pipeline.schema import cast_to, plain_type


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """Return the plain type to which both types convert, or None if there is none.

    The common type may not hold the largest values of one of them: 64-bit integers and floats become float64.
    """
    types = [plain_type(type) for type in (first, second)]
    try:
        fields = [pa.schema([pa.field("", type)]) for type in types]
        joined = pa.unify_schemas(fields, promote_options="permissive").field(0).type
        # Arrow joins decimals and integers to types to which it cannot cast them.
        for type in {*types} - {pa.null(), joined}:
            pa.nulls(1, type).cast(joined)
    except pa.ArrowException:
        return None
    return joined


def join_fields(name: str, found: Iterable[tuple[str, pa.DataType]]) -> pa.Field:
    """Return the field of a kept column that several files have.

    Args:
        name: the column's name in the output.
        found: each file, and the type that the column has there.

    Raises:
        InputError: no type holds the values of all files. Integers next to floats pass: most are small, and
            pandas writes the files whose integers have nulls as floats.
    """
    joined, from_file = pa.null(), ""
    for file, type in found:
        both = common_type(joined, type)
        # Arrow takes int64, which does not hold the upper half of uint64.
        is_halved = both == pa.int64() and pa.uint64() in (joined, plain_type(type))
        if both is None or is_halved:
            raise InputError(
                f"keep must name columns with one type in all files, got {name!r} of type {joined} in "
                f"{from_file} and {type} in {file}; write it with one type, or leave it out"
            )
        if both != joined:
            joined, from_file = both, file
    return pa.field(name, joined)


def with_types(reader: Tables, kept: pa.Schema) -> Tables:
    """Yield the tables of a reader with its kept columns in the types of the output.

    A column whose type does not fit becomes null, and so does a value that the type does not hold exactly.
    Texts that are not UTF-8 are escaped, and nested values with such texts become null. The report says so.
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
            column, note = _fitting(table.column(index).combine_chunks(), field)
            if note:
                notes[note] = None
            table = table.set_column(index, field, column)
        yield table
    if not notes:
        return report
    return replace(report, note="; ".join([*filter(None, [report.note]), *notes]))


def _fitting(column: pa.Array, field: pa.Field) -> tuple[pa.Array, str | None]:
    """Return a column as the output stores it, and a note on what has changed."""
    texts, has_escapes = valid_texts(column)
    if has_escapes:
        how = "null" if pa.types.is_nested(column.type) else "written with escapes"
        note = f"texts of the column {field.name!r} are {how}, because they are not UTF-8"
        return _fitting(texts, field)[0], note
    if column.type == field.type:
        return column, None
    found = f"it has the type {column.type}, and the output {field.type}"
    if common_type(field.type, column.type) != field.type:
        return pa.nulls(len(column), field.type), f"the column {field.name!r} is null, because {found}"
    converted = _cast(column, field.type)
    if converted.null_count > column.null_count:
        return converted, f"values of the column {field.name!r} are null, because {found}"
    return converted, None


def _cast(column: pa.Array, type: pa.DataType) -> pa.Array:
    """Return a column in another type; values that the type does not hold are null."""
    try:
        return cast_to(column, type)
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, type)
    half = len(column) // 2
    # The cast of a slice looks at all elements of nested columns; `take` copies those of its rows.
    parts = [column.take(pa.array(rows)) for rows in (range(half), range(half, len(column)))]
    return pa.concat_arrays([_cast(part, type) for part in parts])
