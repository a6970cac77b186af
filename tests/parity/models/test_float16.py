"""In a float16 model the Q-Former stays in float32, as in the reference; tested here on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Blip2ForConditionalGeneration

from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.models.language_model import LanguageModel
from blip2_actor.testing import NUM_QUERIES

CPU = torch.device("cpu")


@torch.no_grad()
def test_qformer_output_is_finite_for_large_activations(checkpoint_folder: Callable[..., Path]) -> None:
    """Image features in the thousands give attention scores beyond float16; a float16 Q-Former gives NaN."""
    folder = checkpoint_folder("opt")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float16).eval()
    ours, plain = (load_model(resolve(str(folder)), CPU, torch.float16) for _ in range(2))
    plain.qformer.half()
    generator = torch.Generator().manual_seed(1)
    image_embeds = (torch.randn(2, 17, 24, generator=generator) * 3e4).clamp(-6e4, 6e4).half()
    features = ours.qformer_features(image_embeds)
    assert features.dtype is torch.float16
    assert ours.project(features).dtype is torch.float16
    expected = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=image_embeds
    ).last_hidden_state
    assert expected.dtype is torch.float32
    torch.testing.assert_close(features, expected.half(), rtol=1e-3, atol=1e-3)
    assert not plain.qformer_features(image_embeds).isfinite().all()


@torch.no_grad()
def test_float16_model_is_close_to_the_float32_model(checkpoint_folder: Callable[..., Path]) -> None:
    """Each part must convert its output to the next part's dtype. A missing conversion raises, and a wrong
    one gives other logits."""
    for language in ("opt", "t5"):
        folder = checkpoint_folder(language)
        exact, rounded = (load_model(resolve(str(folder)), CPU, d) for d in (torch.float32, torch.float16))
        assert rounded.dtype is torch.float16
        generator = torch.Generator().manual_seed(2)
        pixel_values = torch.randn(2, 3, 28, 28, generator=generator)
        logits = []
        for model in (exact, rounded):
            features = model.qformer_features(model.image_features(pixel_values.to(model.dtype)))
            prefixes = list(model.project(features))
            language_model: LanguageModel = model.language_model
            cache = language_model.new_kv_cache(2, NUM_QUERIES, 4)
            logits.append(language_model.prefill(prefixes, [0, 1], cache).float())
        torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)
