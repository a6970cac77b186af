"""Vectors become fixed-size lists, with nulls for rows that failed; other readers must find the same."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.stages.row_result import fixed_size_lists


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_vectors_and_nulls_survive_parquet_and_arrow_files(shape):
    kind: pa.DataType = pa.float32()
    for size in reversed(shape):
        kind = pa.list_(kind, size)
    vectors = [np.random.default_rng(n).random(shape, np.float32) if n % 3 else None for n in range(7)]
    lists = [None if vector is None else vector.tolist() for vector in vectors]
    table = pa.table({"v": fixed_size_lists(vectors, kind)}).take(pa.array(range(7))).combine_chunks()
    assert table["v"].type == kind
    file = io.BytesIO()
    pq.write_table(table, file)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for read in (pq.read_table(file), pa.ipc.open_file(sink.getvalue()).read_all()):
        assert read.schema == table.schema
        again = pa.concat_tables([read, read]).combine_chunks().take(pa.array([8, 0, 3, 2]))["v"].to_pylist()
        assert again == [lists[1], None, None, lists[2]]
