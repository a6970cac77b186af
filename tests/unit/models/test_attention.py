"""Attention in bfloat16 on a CPU: two ways, of which one keeps all scores in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip2_actor.models import layers


@torch.inference_mode()
@pytest.mark.parametrize("way", ["plain", "causal", "bias", "mask"])
def test_scores_of_many_long_texts_are_never_all_in_memory(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of long prompts took the square of their length, and the system ended the process."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 5, 4, 9, 16, generator=generator).bfloat16()
    bias = torch.randn(1, 4, 9, 9, generator=generator).bfloat16()
    mask = (torch.arange(9) < torch.tensor([9, 1, 3, 8, 2])[:, None])[:, None, None]
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "bias": {"mask": bias, "scale": 1.0},
        "mask": {"mask": mask},
    }
    arguments = ways[way]
    kept: list[int] = []
    attention_weights = layers.attention_weights

    def counted(*arguments: Any) -> torch.Tensor:
        weights = attention_weights(*arguments)
        kept.append(weights.numel())
        return weights

    monkeypatch.setattr(layers, "attention_weights", counted)
    monkeypatch.setattr(layers, "MAX_SCORES", 2 * 4 * 9 * 9)
    found = layers.attend(query, key, value, **arguments)
    few = arguments | {"mask": mask[:2]} if way == "mask" else arguments
    layers.attend(query[:2], key[:2], value[:2], **few)
    assert kept == [layers.MAX_SCORES], "only two of five texts are few enough"
    exact = {"bias": {"mask": bias.float(), "scale": 1.0}}.get(way, arguments)
    expected = layers.attend(query.float(), key.float(), value.float(), **exact)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
