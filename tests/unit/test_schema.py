"""Programs that read the files rely on the row contract: a change here needs a new SCHEMA_VERSION."""

import pyarrow as pa
import pytest

from blip2_actor import Status
from pipeline.column_names import COLUMN_NAMES, SCHEMA_VERSION
from pipeline.schema import ROW_CONTRACT, output_schema

FROZEN = """\
key: string not null
shard: string not null
row: int64 not null
member: string
caption: string
captions: list<item: string>
  child 0, item: string
logprobs: list<item: float>
  child 0, item: float
logprob: float
num_tokens: int32
finish_reason: string
flags: list<item: string> not null
  child 0, item: string
status: string not null
error: string
width: int32
height: int32
sha256: binary"""
STATUSES = [
    "ok",
    "missing_image",
    "unreadable",
    "fetch_failed",
    "undecodable",
    "too_large",
    "decoder_crashed",
    "decoder_timed_out",
    "refused",
    "failed",
]


def test_columns_types_and_statuses_are_frozen():
    assert str(ROW_CONTRACT) == FROZEN
    assert [status.value for status in Status] == STATUSES
    assert SCHEMA_VERSION == 2


def test_the_names_without_types_are_those_of_the_contract():
    """Settings refuse the names in this list; a missing name could be given to another column."""
    assert list(COLUMN_NAMES) == ROW_CONTRACT.names


def test_files_of_a_run_that_version_1_has_begun_have_its_columns():
    assert output_schema(has_member=False).names == [name for name in ROW_CONTRACT.names if name != "member"]


def test_kept_columns_come_last_with_their_types():
    kept = [pa.field("url", pa.string()), pa.field("vector", pa.list_(pa.float32(), 4))]
    assert output_schema(kept) == pa.schema([*ROW_CONTRACT, *kept])


@pytest.mark.parametrize("name", ROW_CONTRACT.names)
def test_a_kept_column_cannot_take_a_name_of_the_contract(name):
    with pytest.raises(
        ValueError, match=f"keep must not name columns that the output has itself, got {name};"
    ):
        output_schema([pa.field(name, pa.string())])


def test_a_kept_column_is_given_once():
    with pytest.raises(ValueError, match="url more than once"):
        output_schema([pa.field("url", pa.string())] * 2)
