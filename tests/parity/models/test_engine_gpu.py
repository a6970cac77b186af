"""The engine on a GPU: the reference's tokens in float32, correct captions in every dtype.

This covers everything that happens only on a GPU: steps replayed as CUDA graphs, kernels, images encoded on a
second stream, and, where a test says so, compiled encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sides.engine_sides import EngineSide, ReferenceSide, Work
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.testing import save_random_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
PROMPTS = (None, "a", "Question: what is it? Answer:", None)
WORK: Work = [(i, PROMPTS[i % 4], 3 + 5 * i % 17) for i in range(40)]
"""Texts of 3 to 19 tokens: more than slots, so that some wait, and slots move."""


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the reference's convolution would round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def config(folder: Path, dtype: str = "float32", **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cuda", dtype=dtype, **({"compile": False} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def midsize(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint("midsize", tmp_path_factory.mktemp("models"), "cuda", torch.float32)


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_float32_gives_the_tokens_of_the_reference(
    language: str, num_beams: int, checkpoint_folder: Callable[..., Path]
) -> None:
    folder = checkpoint_folder(language)
    found = EngineSide(config(folder, max_slots=20), WORK, num_beams).run()
    assert found == ReferenceSide(folder, "float32", "cuda", WORK, num_beams).run(1)


@pytest.mark.parametrize(("num_beams", "compiled"), [(1, False), (1, True), (5, False)])
def test_float32_gives_the_tokens_of_the_reference_at_midsize(
    midsize: Path, num_beams: int, compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With random weights, two beams can be so close that the order of a sum decides between them."""
    options = config(midsize, max_slots=20, encode_batch=16, compile=compiled)
    found = EngineSide(options, WORK, num_beams).run()
    expected = ReferenceSide(midsize, "float32", "cuda", WORK, num_beams).run(8)
    num_different = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    assert num_different <= (0 if num_beams == 1 else 1)
    assert "could not be compiled" not in caplog.text


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_captions_of_scenes_are_true_in_every_dtype(
    dtype: str, compiled: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    scenes = SceneSampler("held_out", 20_261).sample(500)
    images, truths = draw(scenes, 64), [str(caption) for caption in scenes.captions]
    with Engine(config(DEMO_FOLDER, dtype, compile=compiled)) as engine:
        results = engine.generate([Request(image=i) for i in images], GenerationOptions(max_new_tokens=30))
    exact = sum(r.text == truth for r, truth in zip(results, truths, strict=True)) / len(truths)
    with capsys.disabled():
        print(f"\n{dtype}, compiled {compiled}: {exact:.1%} of captions are true word for word")
    assert exact >= 0.95
    assert "could not be compiled" not in caplog.text


def test_features_are_those_of_the_cpu() -> None:
    """The inputs are copied while the device computes on the engine's streams."""
    images = list(draw(SceneSampler("held_out", 3).sample(200), 64))
    found = []
    for device in ("cpu", "cuda"):
        with Engine(EngineConfig(model=str(DEMO_FOLDER), device=device, dtype="float32")) as engine:
            found.append(engine.features(images, with_image_embeds=True))
    for on_cpu, on_gpu in zip(*found, strict=True):
        for name in ("pooler_output", "qformer_features", "image_embeds"):
            torch.testing.assert_close(
                torch.from_numpy(getattr(on_gpu, name)),
                torch.from_numpy(getattr(on_cpu, name)),
                rtol=1e-3,
                atol=1e-3,
            )
