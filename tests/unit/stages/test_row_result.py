"""Results become columns: vectors with nulls for failed rows; a row that fits no column fails alone."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import Completion, Result, Status
from blip2_actor.testing import FakeEngineConfig
from pipeline.schema import output_schema
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.stages.caption import CaptionStage
from pipeline.stages.output_rows import output_rows
from pipeline.stages.row_result import RowResult, columns_of
from tests.unit.stages.decoded_tables import decoded, pixels_of


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_vectors_and_nulls_survive_parquet_and_arrow_files(shape):
    """They are stored as plain lists: pyarrow before version 26 cannot read fixed-size lists with a null."""
    kind: pa.DataType = pa.float32()
    for _ in shape:
        kind = pa.list_(kind)
    vectors = [np.random.default_rng(n).random(shape, np.float32) if n % 3 else None for n in range(7)]
    lists = [None if vector is None else vector.tolist() for vector in vectors]
    failed = RowResult(Result(status=Status.FAILED))
    rows = [failed if vector is None else RowResult(Result(), {"v": vector}) for vector in vectors]
    column = columns_of(rows, [pa.field("v", kind)])["v"]
    table = pa.table({"v": column}).take(pa.array(range(7))).combine_chunks()
    assert table["v"].type == kind
    file = io.BytesIO()
    pq.write_table(table, file)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for read in (pq.read_table(file), pa.ipc.open_file(sink.getvalue()).read_all()):
        assert read["v"].to_pylist() == lists
        again = pa.concat_tables([read, read]).combine_chunks().take(pa.array([8, 0, 3, 2]))["v"].to_pylist()
        assert again == [lists[1], None, None, lists[2]]


def result(text: str) -> RowResult:
    return RowResult(
        Result(completions=(Completion(text=text, token_ids=(1,), logprob=-1.0, finish_reason="stop"),))
    )


def test_a_text_that_is_no_utf8_fails_alone():
    """Its surrogate used to make pyarrow raise in the captioning process, which ended the job."""
    table = decoded(
        map(pixels_of, range(5)),
        key=pa.array("abcde"),
        shard=pa.array(["s"] * 5),
        row=pa.array(range(5), pa.int64()),
        member=pa.nulls(5, pa.string()),
        label=pa.array([7] * 5),
    )
    stage = CaptionStage(CaptionSpec(engine=FakeEngineConfig()))
    texts = ["zero", "one", "\udc80", "three", "four"]
    finished = [(n, result(text)) for n, text in enumerate(texts)]
    rows = output_rows(table, finished, ["label"], stage)
    assert rows.schema == output_schema([pa.field("label", pa.int64())])
    assert rows["caption"].to_pylist() == ["zero", "one", None, "three", "four"]
    assert rows["status"].to_pylist() == ["ok", "ok", "failed", "ok", "ok"]
    assert rows["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert rows["label"].to_pylist() == [7, 7, None, 7, 7]
    assert rows["error"][2].as_py().startswith("the row cannot be written: UnicodeEncodeError")
    stage.close()


@pytest.mark.parametrize(
    ("type", "value"),
    [
        (pa.list_(pa.null()), [None, None]),
        (pa.list_(pa.struct([("license", pa.null())])), [{"license": None}, {"license": None}]),
        (pa.map_(pa.string(), pa.list_(pa.null())), [("a", [None, None])]),
    ],
    ids=str,
)
def test_kept_lists_of_nulls_without_a_type_can_be_written(type, value):
    """Arrow 26 makes too few nulls in a cast, so such rows could not be written, and used to fail."""
    table = decoded(
        map(pixels_of, range(4)),
        key=pa.array("abcd"),
        shard=pa.array(["s"] * 4),
        row=pa.array(range(4), pa.int64()),
        member=pa.nulls(4, pa.string()),
        label=pa.array([value] * 4, type),
    )
    stage = CaptionStage(CaptionSpec(engine=FakeEngineConfig()))
    for positions in ([0], [1, 2], [3]):
        rows = output_rows(table, [(n, result("a text")) for n in positions], ["label"], stage)
        assert rows["status"].to_pylist() == ["ok"] * len(positions)
        assert rows["label"].to_pylist() == [value] * len(positions)
    stage.close()
