"""Images of another size than the checkpoint's, against transformers' `interpolate_pos_encoding=True`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from blip2_actor import Blip2Actor, EngineConfig, GenerationOptions
from blip2_actor.testing import IMAGE_SIZE_PX
from tests.engines import cpu_config
from tests.parity.checkpoints.edited_checkpoint import pixel_values, reference_ids

PATCH_PX = 7


@pytest.mark.parametrize(
    ("language", "size_px"), [("opt", IMAGE_SIZE_PX + 3 * PATCH_PX), ("t5", IMAGE_SIZE_PX - PATCH_PX)]
)
def test_tokens_and_features_equal_the_references(
    checkpoint_folder: Callable[..., Path],
    reference: Callable[..., Blip2ForConditionalGeneration],
    language: str,
    size_px: int,
) -> None:
    folder = checkpoint_folder(language)
    images = list(np.random.default_rng(0).integers(0, 256, (2, size_px, size_px, 3), np.uint8))
    config = cpu_config(folder, image_size_px=size_px)
    actor = Blip2Actor(config, GenerationOptions(max_new_tokens=8))
    try:
        found = [list(result.token_ids) for result in actor.caption(images)]
        features = actor.engine.features(images, with_image_embeds=True)
        png = io.BytesIO()
        Image.fromarray(images[0]).resize((80, 50)).save(png, "PNG")
        assert actor.caption([png.getvalue()])[0].ok
    finally:
        actor.close()
    assert actor.info.image_size_px == size_px
    assert found == reference_ids(folder, images, max_new_tokens=8, interpolate_pos_encoding=True)
    with torch.no_grad():
        vision = reference(language).vision_model(pixel_values(images), interpolate_pos_encoding=True)
    for one, expected in zip(features, vision.last_hidden_state, strict=True):
        torch.testing.assert_close(torch.from_numpy(one.image_embeds), expected, rtol=1e-4, atol=1e-5)


def test_a_size_that_is_not_whole_patches_is_refused_before_work(
    checkpoint_folder: Callable[..., Path],
) -> None:
    model = str(checkpoint_folder("opt"))
    with pytest.raises(ValueError, match=r"^image_size_px must be a multiple of .*, 7, got 30; .* is 28$"):
        EngineConfig(model=model, device="cpu", image_size_px=30).info()
    with pytest.raises(ValueError, match="image_size_px must be at least 1, got 0"):
        EngineConfig(model=model, device="cpu", image_size_px=0)
