"""Which shards a read task reads: each one once, in few tasks, and the last tasks are short."""

from __future__ import annotations

import pytest

from pipeline.inputs.datasource import MAX_READ_TASKS, MAX_TASK_FILES, group_work
from pipeline.inputs.reader import ShardWork
from pipeline.inputs.shards import Shard
from pipeline.storage.packed_texts import PackedTexts


def work_of(num_shards: int, num_files: int = 1) -> list[ShardWork]:
    files = PackedTexts(map(str, range(num_files)))
    shards = (Shard(name=str(n), format="folder", root="/in", files=files) for n in range(num_shards))
    return [ShardWork(shard=shard) for shard in shards]


@pytest.mark.parametrize("num_shards", [0, 1, MAX_READ_TASKS, MAX_READ_TASKS + 1, 30_000])
def test_each_shard_is_in_one_group_and_there_are_few(num_shards):
    work = work_of(num_shards)
    groups = group_work(work)
    assert [one for group in groups for one in group] == work
    assert len(groups) <= MAX_READ_TASKS
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1:] in ([], [1])


def test_a_group_names_few_files():
    groups = group_work(work_of(MAX_READ_TASKS + 500, num_files=MAX_TASK_FILES // 2))
    assert max(map(len, groups)) == 2
