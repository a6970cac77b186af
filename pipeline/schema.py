"""The row contract: the columns of every output file with their exact types, frozen by a test.

The rule: every input row becomes one output row, in the file of its shard and in the order of the input. The
columns of the contract are followed by the named outputs, and then by the kept columns of the input.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pipeline.column_names import refuse_taken_names

FINGERPRINT_KEY = b"blip2.fingerprint"
RUN_ID_KEY = b"blip2.run_id"
"""Keys in the footer of every file that a run has written."""

IDENTITY = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("member", pa.string()),
)
"""Where a row came from. Version 1 has no `member`."""

RESULTS = (
    pa.field("caption", pa.string()),
    pa.field("captions", pa.list_(pa.string())),
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("logprob", pa.float32()),
    pa.field("num_tokens", pa.int32()),
    pa.field("finish_reason", pa.string()),
    pa.field("flags", pa.list_(pa.string()), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("sha256", pa.binary()),
)
"""The results of a row: the columns that `pipeline.caption` adds to a dataset."""

ROW_CONTRACT = pa.schema([*IDENTITY, *RESULTS])

LIST_COLUMNS = ("captions", "logprobs")
"""Columns that a dataset gets only if several texts per image are requested."""
CAPTION_COLUMNS = ("caption", *LIST_COLUMNS, "logprob", "num_tokens", "finish_reason")
"""Columns that exist only if captions are made."""


def result_fields(captioned: bool, num_return_sequences: int) -> tuple[pa.Field, ...]:
    """Return the result columns that a dataset gets.

    Args:
        captioned: whether captions are made.
        num_return_sequences: texts per image; the list columns exist only if there are several.
    """
    left_out = () if captioned else CAPTION_COLUMNS
    if num_return_sequences == 1:
        left_out = (*left_out, *LIST_COLUMNS)
    return tuple(field for field in RESULTS if field.name not in left_out)


def output_schema(
    kept: Iterable[pa.Field] = (),
    named: Iterable[pa.Field] = (),
    captioned: bool = True,
    has_member: bool = True,
) -> pa.Schema:
    """Return the complete schema of a run's files.

    Args:
        kept: columns of the input that the user keeps, in the order given.
        named: columns that the user has named: answers, vectors, scores.
        captioned: whether captions are made; otherwise their columns are left out.
        has_member: whether the rows have a `member`; those of version 1 do not.

    Raises:
        ValueError: a kept column has the name of a column of the output, or is given twice.
    """
    kept, named = list(kept), list(named)
    taken = [*ROW_CONTRACT.names, *(field.name for field in named)]
    refuse_taken_names([field.name for field in kept], taken, "keep")
    left_out = (*(() if captioned else CAPTION_COLUMNS), *(() if has_member else ("member",)))
    contract = [field for field in ROW_CONTRACT if field.name not in left_out]
    return pa.schema([*contract, *named, *kept])


def plain_type(type: pa.DataType) -> pa.DataType:
    """Return the type in which a column is written.

    Views, dictionaries, fixed-size lists and extensions such as tensors, on every level, become the types
    that every reader of Parquet knows, and that can be sorted and joined. pyarrow before version 26 cannot
    read a column of fixed-size lists that has a null.
    """
    types = pa.types
    if isinstance(type, pa.BaseExtensionType) and not isinstance(type, (pa.UuidType, pa.JsonType)):
        return plain_type(type.storage_type)
    if types.is_string_view(type):
        return pa.string()
    if types.is_binary_view(type):
        return pa.binary()
    if types.is_dictionary(type):
        return plain_type(type.value_type)
    if types.is_list(type) or types.is_list_view(type) or types.is_fixed_size_list(type):
        return pa.list_(plain_type(type.value_type))
    if types.is_large_list(type) or types.is_large_list_view(type):
        return pa.large_list(plain_type(type.value_type))
    if types.is_struct(type):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in type])
    if types.is_map(type):
        return pa.map_(plain_type(type.key_type), plain_type(type.item_type))
    return type


def to_plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a column in its plain type."""
    plain = plain_type(column.type)
    if plain == column.type:
        return column
    try:
        found = column.cast(plain)
        found.validate()
        return found
    except pa.ArrowException:
        # Arrow 26 cannot cast a null struct with a dictionary, and makes invalid lists of some list views.
        return pa.array(column.to_pylist(), plain)


def cast_to(column: pa.Array | pa.ChunkedArray, type: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Return a column in another type.

    Raises:
        pa.ArrowInvalid: the type does not hold a value.
    """
    found = column.cast(type)
    try:
        found.validate()
    except pa.ArrowInvalid:  # Arrow 26 makes too few nulls in structs and lists, of the same type too.
        return pa.array(column.to_pylist(), type)
    return found
