"""The row contract: the columns of every output file, with exact types, frozen by a test.

Every input row becomes one row here: same shard, same order. After these columns come the named
outputs and then the kept columns of the input.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pipeline.column_names import refuse_taken_names

IDENTITY = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
)
"""Where a row came from."""

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
"""What became of it: the columns that `pipeline.caption` adds to anyone's dataset."""

ROW_CONTRACT = pa.schema([*IDENTITY, *RESULTS])

LISTS = ("captions", "logprobs")
"""The columns that are there when more than one text per image is asked for."""
OF_CAPTIONS = ("caption", *LISTS, "logprob", "num_tokens", "finish_reason")
"""The columns that are there when captions are made."""


def result_fields(captioned: bool, num_return_sequences: int) -> tuple[pa.Field, ...]:
    """The result columns of a dataset stage; the lists come only when more than one text is asked for."""
    without = () if captioned else OF_CAPTIONS
    if num_return_sequences == 1:
        without = (*without, *LISTS)
    return tuple(field for field in RESULTS if field.name not in without)


def output_schema(
    kept: Iterable[pa.Field] = (), named: Iterable[pa.Field] = (), captioned: bool = True
) -> pa.Schema:
    """The whole schema of a run's files.

    Args:
        kept: columns of the input that the user keeps, in the order asked for.
        named: columns that the user has named: answers, vectors, scores.
        captioned: whether captions are made; else their columns are left out.

    Raises:
        ValueError: a kept column has the name of a column of the output, or comes twice.
    """
    kept, named = list(kept), list(named)
    taken = [*ROW_CONTRACT.names, *(field.name for field in named)]
    refuse_taken_names([field.name for field in kept], taken, "keep")
    contract = [field for field in ROW_CONTRACT if captioned or field.name not in OF_CAPTIONS]
    return pa.schema([*contract, *named, *kept])
