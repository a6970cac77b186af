"""Options that name members of a tar are checked against its first samples before a run starts."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.formats import check_options, webdataset
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard
from tests.unit.inputs.formats.reading_cases import shard_at, tar_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_columns": ("tx",)},
            "text to score must .* got 'tx'; the first 16 samples of .*0.tar have jpg, txt, url",
        ),
        ({"prompt_column": "promt"}, "prompt_column must be a member of the samples, got 'promt'"),
        ({"keep": ("txt", "link=ulr")}, "keep must be a member of the samples, got 'ulr'"),
        ({"image_column": "left.jpg"}, "image_column must be a member of the samples, got 'left.jpg'"),
    ],
)
def test_a_member_that_no_sample_has_is_refused(tmp_path, options, message):
    """Every row would lack its score, prompt or kept column, and the run would still succeed."""
    members = [(f"{at:02}.{kind}", b"x") for at in range(20) for kind in ("jpg", "TXT")]
    members.insert(20, ("09.url", b"x"))
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    shard = shard_at(tmp_path / "0.tar", "webdataset")
    with pytest.raises(InputError, match=message):
        check_options([shard], ReadOptions(**options))
    good = ReadOptions(
        text_columns=("Txt", "url"), prompt_column="txt", keep=("link=URL",), image_column="jpg"
    )
    check_options([shard], good)
    (tmp_path / "0.tar").write_bytes(b"no tar")
    check_options([shard], ReadOptions(**options))


def test_a_member_may_be_in_a_later_tar_and_only_the_needed_tars_are_opened(tmp_path, monkeypatch):
    """Opening each of a thousand tars in a bucket would take half as long as a run."""
    for at in range(6):
        members = [("a.jpg", b"x"), ("a.json" if at == 2 else "a.txt", b"x")]
        (tmp_path / f"{at}.tar").write_bytes(tar_bytes(members))
    shards = [shard_at(tmp_path / f"{at}.tar", "webdataset") for at in range(6)]
    opened, first_extensions = list[str](), webdataset.first_extensions

    def record(shard: Shard, max_samples: int) -> list[list[str]]:
        opened.append(shard.name)
        return first_extensions(shard, max_samples)

    monkeypatch.setattr(webdataset, "first_extensions", record)
    for keep, num_opened in (((), 0), (("txt",), 1), (("txt", "json"), 3)):
        opened.clear()
        check_options(shards, ReadOptions(keep=keep))
        assert len(opened) == num_opened
    pq.write_table(pa.table({"image": [b"x"], "url": ["y"]}), tmp_path / "table.parquet")
    shards.insert(0, shard_at(tmp_path / "table.parquet", "parquet"))
    with pytest.raises(
        InputError,
        match=r"got 'url'; the first 4 samples of the first tars, from .*0.tar on, have .*; .*sort the tar",
    ):
        check_options(shards, ReadOptions(keep=("url",)))
