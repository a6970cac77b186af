"""Free slots take no memory on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip2_actor.models.kv_cache import KVCache
from tests.unit.checkpoints.test_safetensors_file import status_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_free_slots_take_no_memory() -> None:
    """128 slots of a 2.7 B model are 5 GB; writing zeros would take that memory before the first image."""
    before = status_bytes("VmRSS")
    cache = KVCache(4, 64, 256, 512, torch.device("cpu"), torch.bfloat16)
    cache.write_prefix(0, torch.tensor([0]), torch.ones(1, 8, 1024))
    assert cache.num_bytes == 256 << 20
    assert status_bytes("VmRSS") - before < 32 << 20
    assert cache.kv[0, 0, :8].eq(1).all()
    assert not cache.kv[0, 0, 8:].any()
