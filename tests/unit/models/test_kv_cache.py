"""Free slots take no memory on a CPU, and slots are copied as if at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip2_actor.models.kv_cache import KVCache, aligned_arange
from tests.unit.checkpoints.weights.test_safetensors_file import status_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_free_slots_take_no_memory() -> None:
    """128 slots of a 2.7 B model take 5 GB; writing zeros would use it before the first image."""
    before = status_bytes("VmRSS")
    cache = KVCache(4, 64, 256, 512, torch.device("cpu"), torch.bfloat16)
    cache.write_prefix(0, torch.tensor([0]), torch.ones(1, 8, 1024))
    assert cache.num_bytes == 256 << 20
    assert status_bytes("VmRSS") - before < 32 << 20
    assert cache.kv[0, 0, :8].eq(1).all()
    assert not cache.kv[0, 0, 8:].any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_free_slots_take_no_memory_when_all_slots_grow() -> None:
    """One long prompt used to take the memory of all slots: up to 16 GB with a 2.7 B model."""
    before = status_bytes("VmRSS")
    cache = KVCache(4, 64, 64, 512, torch.device("cpu"), torch.bfloat16)
    cache.write_prefix(3, torch.tensor([1, 0]), torch.ones(2, 8, 1024))
    cache.copy_slots([1], [2], 8)
    cache.grow(200, 56)
    assert cache.num_bytes == 256 << 20
    assert status_bytes("VmRSS") - before < 32 << 20
    assert cache.kv[3, :3, :8].eq(1).all()
    assert not cache.kv[3, :3, 8:].any()


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([5, 4], [0, 2]), ([1, 1], [3, 0]), ([0, 1, 2], [1, 2, 0])],
    ids=["apart", "one to two", "in a circle"],
)
def test_slots_are_copied_as_if_at_the_same_time(sources: list[int], targets: list[int]) -> None:
    cache = KVCache(2, 6, 8, 2, torch.device("cpu"), torch.float32)
    cache.kv.copy_(torch.arange(cache.kv.numel()).view(cache.kv.shape))
    before = cache.kv.clone()
    cache.copy_positions(sources, targets, 2, 5)
    expected = before.clone()
    expected[:, targets, 2:5] = before[:, sources, 2:5]
    assert cache.kv.equal(expected)


def test_texts_of_many_lengths_share_their_positions() -> None:
    """Every length used to keep its own tensor forever: 256 MB after prompts of 1 to 8,000 tokens."""
    arrays = [aligned_arange(length, torch.device("cpu")) for length in range(1, 1000)]
    assert all(array.equal(torch.arange(len(array))) for array in arrays)
    assert [len(array) for array in arrays[:9]] == [8] * 8 + [16]
    assert len({array.data_ptr() for array in arrays}) <= 8
