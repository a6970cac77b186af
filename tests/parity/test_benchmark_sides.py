"""Both sides of the engine's benchmark do the same work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.sides import EngineSide, ReferenceSide, Work
from blip2_actor import EngineConfig

WORK: Work = [(0, None, 4), (1, "what is it?", 4), (0, "a", 4), (1, None, 6)]


@pytest.mark.parametrize(
    ("language", "ids"),
    [
        ("opt", {}),
        ("t5", {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}),
    ],
)
def test_the_reference_reads_the_prompts_that_the_engine_reads(
    language: str, ids: dict[str, int], checkpoint_folder: Callable[..., Path]
) -> None:
    """In the published T5 models the whole default prompt is token 1, which is padding in OPT's."""
    folder = checkpoint_folder(language, **ids)
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", num_threads=1)
    ours = EngineSide(config, WORK, 1)
    theirs = ReferenceSide(folder, "float32", "cpu", WORK, 1)
    assert ours.run() == theirs.run(4) == theirs.run(1)
    ours._engine.close()
