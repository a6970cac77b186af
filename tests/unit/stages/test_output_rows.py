"""A row that cannot be written costs itself, never its call, its shard or the job."""

from __future__ import annotations

import pyarrow as pa

from blip2_actor import Completion, Result
from blip2_actor.testing import FakeEngineConfig
from pipeline.schema import output_schema
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.stages.caption import CaptionStage
from pipeline.stages.output_rows import output_rows
from pipeline.stages.row_result import RowResult
from tests.unit.stages.decoded_tables import decoded, pixels_of


def result(text: str) -> RowResult:
    return RowResult(
        Result(completions=(Completion(text=text, token_ids=(1,), logprob=-1.0, finish_reason="stop"),))
    )


def test_a_text_that_is_no_utf8_fails_alone():
    """Its surrogate made pyarrow raise in the captioning process, which ended the job."""
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
