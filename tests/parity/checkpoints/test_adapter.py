"""LoRA adapters written by PEFT and merged while loading, against transformers with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from blip2_actor import GenerationOptions, load_for_training, save_model
from blip2_actor.checkpoints.weights.adapter import merge_adapter
from blip2_actor.checkpoints.weights.stored_tensor import read_whole
from blip2_actor.checkpoints.weights.weight_files import list_weights
from blip2_actor.testing import NUM_QUERIES, random_images
from tests.parity.checkpoints.edited_checkpoint import engine_ids, pixel_values

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
"""PEFT calls functions that transformers has renamed, and warns about fields that it leaves out."""

NUM_TOKENS = 8
IMAGES = [image.numpy() for image in random_images(3)]


@torch.no_grad()
def save_adapter(base: Path, folder: Path, *, safe: bool = True, **options: Any) -> peft.PeftModel:
    """Write an adapter of random numbers as PEFT does after training; return the model with it."""
    model = Blip2ForConditionalGeneration.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    adapted.save_pretrained(str(folder), safe_serialization=safe)
    return adapted.eval()


@torch.no_grad()
def expected_ids(model: peft.PeftModel | Blip2ForConditionalGeneration, is_opt: bool) -> list[list[int]]:
    made = model.generate(
        pixel_values=pixel_values(IMAGES),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    return made[:, NUM_QUERIES + 1 if is_opt else 1 :].tolist()


def our_ids(model: Path, adapter: Path | None) -> list[list[int]]:
    options = GenerationOptions(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return engine_ids(model, IMAGES, options=options, adapter=None if adapter is None else str(adapter))


EVERYWHERE = r".*\.(qkv|projection|fc1|fc2|query|key|value|dense|q_proj|v_proj|out_proj|q|v|wi_0|wo|o)"
PLACES: dict[str, dict[str, Any]] = {
    "opt": {"target_modules": "all-linear"},
    "t5": {"target_modules": "all-linear", "use_rslora": True},
    "opt, lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "opt, embeddings": {"target_modules": ["embed_tokens"]},
    "opt, embeddings saved": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]},
}
"""Adapters whose tokens are compared: the language model, then the adapted layers."""


@pytest.mark.parametrize("case", PLACES)
def test_tokens_equal_those_of_transformers_with_peft(
    case: str, checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In OPT the head and the embeddings are one tensor, and an adapter changes only one of its uses."""
    language = case.partition(",")[0]
    base = checkpoint_folder(language)
    adapted = save_adapter(base, tmp_path, **PLACES[case])
    ours = our_ids(base, tmp_path)
    assert ours == expected_ids(adapted, language == "opt")
    assert ours != our_ids(base, None)


def test_a_merged_adapter_is_saved_for_transformers(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The head and the embeddings are no longer one tensor, and the configuration must say so."""
    base = checkpoint_folder("opt")
    adapted = save_adapter(base, tmp_path / "adapter", **PLACES["opt, lm_head"])
    names: dict[str, Any] = {"adapter": tmp_path / "adapter"}
    save_model(load_for_training(base, device="cpu", **names), tmp_path / "merged", like=base, **names)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert expected_ids(theirs, is_opt=True) == expected_ids(adapted, is_opt=True)
    assert our_ids(tmp_path / "merged", None) == our_ids(base, tmp_path / "adapter")


CONFIGS: dict[str, dict[str, Any]] = {
    "fan in, fan out": {"fan_in_fan_out": True},
    "patterns": {
        "rank_pattern": {"q_proj|q": 2, r"layers\.1\.self_attn\.qkv": 3},
        "alpha_pattern": {"fc1": 3, "language_model.*(v_proj|v)": 1},
        "use_rslora": True,
    },
    "all biases, pickled": {"bias": "all", "safe": False},
    "adapted biases": {"bias": "lora_only", "lora_bias": True, "target_modules": ["qkv", "value", "fc2"]},
    "convolution, modules saved": {
        "target_modules": ["patch_embedding"],
        "modules_to_save": ["language_projection", "post_layernorm", "layer_norm"],
    },
}


@pytest.mark.parametrize(("case", "language"), [*((case, "opt") for case in CONFIGS), ("patterns", "t5")])
def test_merged_tensors_equal_those_of_peft(
    case: str, language: str, checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Compare every tensor, including those that make no difference for the test images."""
    base = checkpoint_folder(language)
    adapted = save_adapter(base, tmp_path, **{"target_modules": EVERYWHERE, **CONFIGS[case]})
    stored = list_weights(base)
    merged = merge_adapter(stored, tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    assert merged.keys() == stored.keys()
    num_changed = 0
    for name, tensor in merged.items():
        value = read_whole(tensor)
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        num_changed += not torch.equal(value, read_whole(stored[name]))
    assert num_changed > 1
