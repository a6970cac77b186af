"""The OPT variants that BLIP-2 may use, against transformers: on whole texts, and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import OPTForCausalLM

from blip2_actor.checkpoints.weights.load_weights import load_weights
from blip2_actor.checkpoints.weights.name_map import name_map
from blip2_actor.checkpoints.weights.weight_files import list_weights
from blip2_actor.models.opt import OptDecoder
from blip2_actor.testing import randomize_weights, tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "norms after": {"do_layer_norm_before": False},
    "head of its own": {"tie_word_embeddings": False},
    "no biases": {"enable_bias": False},
    "norms without weights": {"layer_norm_elementwise_affine": False},
    "no final norm": {"_remove_final_layer_norm": True},
}


class Holder(nn.Module):
    """Holds the decoder under its name in a checkpoint."""

    def __init__(self, language_model: OptDecoder) -> None:
        super().__init__()
        self.language_model = language_model


@pytest.fixture(params=VARIANTS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[OptDecoder, OPTForCausalLM]:
    config = tiny_config("opt", **VARIANTS[request.param]).text_config
    reference = OPTForCausalLM(config).eval()
    randomize_weights(reference)
    tensors = {f"language_model.{name}": p.detach() for name, p in reference.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    ours = OptDecoder(config).eval()
    load_weights(Holder(ours), list_weights(tmp_path), name_map("opt", 2), "a test")
    return ours, reference


@torch.no_grad()
def expected_logits(reference: OPTForCausalLM, prefix: Tensor, text: Tensor) -> Tensor:
    """float[U, V], the logits that predict each token of the text."""
    embeds = torch.cat([prefix, reference.get_input_embeddings()(text)])[None]
    return reference(inputs_embeds=embeds).logits[0, len(prefix) - 1 : -1]


@torch.no_grad()
def test_logits_of_given_texts_and_of_decode_steps(models: tuple[OptDecoder, OPTForCausalLM]) -> None:
    """A wrong norm, bias or projection for a variant would change every logit."""
    ours, reference = models
    generator = torch.Generator().manual_seed(8)
    width = ours.embed_tokens.embedding_dim
    prefixes = [torch.randn(n, width, generator=generator) for n in (7, 5, 7)]
    texts = [torch.randint(5, 260, (4,), generator=generator) for _ in prefixes]
    expected = [expected_logits(reference, p, t) for p, t in zip(prefixes, texts, strict=True)]
    torch.testing.assert_close(ours.predict(prefixes, texts), expected, rtol=1e-4, atol=1e-4)

    cache = ours.new_kv_cache(3, 7, 4)
    steps = [ours.prefill(prefixes, [0, 1, 2], cache)]
    for i in range(3):
        lengths = torch.tensor([len(p) + i for p in prefixes])
        steps.append(ours.decode(torch.stack([t[i] for t in texts]), lengths, cache, int(lengths.max()) + 1))
    torch.testing.assert_close(
        list(torch.stack(steps, dim=1)), expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"decode steps: {m}"
    )
