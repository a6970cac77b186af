"""Both sides of a benchmark do the same work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serve.load import Answer, summary
from benchmarks.sides.engine_sides import EngineSide, ReferenceSide, Work
from benchmarks.sides.map_batches import Captioner
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.demo.scenes import SceneSampler, draw
from tests.engines import cpu_config

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
    """The default prompt of the published T5 models is token 1 alone, which is padding in the OPT models."""
    folder = checkpoint_folder(language, **ids)
    config = cpu_config(folder)
    ours = EngineSide(config, WORK, 1)
    theirs = ReferenceSide(folder, "float32", "cpu", WORK, 1)
    assert ours.run() == theirs.run(4) == theirs.run(1)
    ours._engine.close()


def test_a_batch_around_generate_gives_the_captions_of_the_engine() -> None:
    """If one side stopped late or saw other pixels, the benchmark would compare different work."""
    scenes = draw(SceneSampler("held_out", 0).sample(8), 320)
    theirs = Captioner(str(DEMO_FOLDER), "float32", None, 30, 0)
    with Engine(EngineConfig(model="demo", dtype="float32", device="cpu")) as engine:
        ours = engine.generate(
            [Request(image=scene) for scene in scenes], GenerationOptions(max_new_tokens=30)
        )
    assert theirs.captions([Image.fromarray(scene) for scene in scenes]) == [result.text for result in ours]


def test_answers_after_the_first_caller_left_do_not_count_as_throughput() -> None:
    """Towards the end the load falls below the target. Errors count neither as throughput nor as latency."""
    answers = [Answer(0, 1, None), Answer(0, 3, "503"), Answer(1, 2, None), Answer(1, 4, None)]
    found = summary(answers, until=2)
    assert (found["per_s"], found["p50_ms"], found["errors"]) == (1.0, 1000.0, {"503": 1})
