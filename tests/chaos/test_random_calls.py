"""Thousands of random calls from several threads: each gets the expected result and affects no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from blip2_actor import EngineConfig
from tests.unit.engine.random_calls import call_at_random

SEEDS = range(4)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_random_calls_do_no_harm(num_threads: int, tmp_path: Path) -> None:
    config = EngineConfig(
        model="demo", device="cpu", dtype="float32", num_threads=num_threads, max_slots=8, allow_urls=True
    )
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    folders = [tmp_path / str(seed) for seed in SEEDS]
    for folder in folders:
        folder.mkdir()
    with config.build() as engine, ThreadPoolExecutor(len(SEEDS)) as callers:
        before = engine.generate(picture)
        calls = [
            callers.submit(call_at_random, engine, 1000, seed, folder)
            for seed, folder in zip(SEEDS, folders, strict=True)
        ]
        assert all(len(call.result(600)) >= 1000 for call in calls)
        assert engine.generate(picture)[0].token_ids == before[0].token_ids
        assert engine.stats().num_running == engine.stats().num_waiting == 0
