"""Tiny BLIP-2 checkpoints with random weights, written by transformers, for comparison with transformers.

They have every part of a published checkpoint (three or four layers each, widths of 16 to 32) and run in
milliseconds. Their weights depend on the seed alone, so that a failing test fails again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from blip2_actor.testing.random_weights import randomize_weights
from blip2_actor.testing.tokenizer import IMAGE_TOKEN, byte_tokenizer

NUM_QUERIES = 5
IMAGE_SIZE_PX = 28
BOS_TOKEN_ID, PAD_TOKEN_ID, EOS_TOKEN_ID, IMAGE_TOKEN_ID = 2, 1, 3, 4
_SPECIAL_IDS = {
    "<unk>": 0,
    "<pad>": PAD_TOKEN_ID,
    "</s>": BOS_TOKEN_ID,
    "<end>": EOS_TOKEN_ID,
    IMAGE_TOKEN: IMAGE_TOKEN_ID,
}
_VOCAB_SIZE = 264


def tiny_tokenizer(language: str) -> PreTrainedTokenizerFast:
    """Build a byte tokenizer: "opt" puts `</s>` first, "t5" puts `<end>` last, as the published ones do."""
    return byte_tokenizer(
        _SPECIAL_IDS,
        len(_SPECIAL_IDS),
        "</s> $A" if language == "opt" else "$A <end>",
        bos_token="</s>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def tiny_config(language: str = "opt", image_token: bool = True, **text: Any) -> Blip2Config:
    """Return the configuration of a tiny BLIP-2.

    Args:
        language: language model, "opt" or "t5".
        image_token: whether the configuration names an image token, as newer checkpoints do.
        text: fields of the language model's configuration that replace the ones here.
    """
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE_PX,
        patch_size=7,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
        encoder_hidden_size=24,
        max_position_embeddings=64,
    )
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=_tiny_opt(**text) if language == "opt" else _tiny_t5(**text),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN_ID if image_token else None,
    )


def save_tiny_checkpoint(
    folder: Path, language: str = "opt", image_token: bool = True, seed: int = 0, **text: Any
) -> Path:
    """Write a checkpoint with random weights, as transformers writes it.

    Args:
        folder: folder of the checkpoint.
        seed: seed of the weights.
        language, image_token, text: as for `tiny_config`.

    Returns:
        `folder`.
    """
    model = Blip2ForConditionalGeneration(tiny_config(language, image_token, **text)).eval()
    if language == "t5" and not model.config.text_config.scale_decoder_outputs:
        # transformers ties the head of every new T5 to its embeddings; published checkpoints store their own.
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    randomize_weights(model, seed=seed)
    model.save_pretrained(folder)
    tiny_tokenizer(language).save_pretrained(folder)
    return folder


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    """Return uint8[count, S, S, 3] of noise, with S the image size of the tiny checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), generator=generator, dtype=torch.uint8
    )


def _tiny_opt(**text: Any) -> OPTConfig:
    fields = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "word_embed_proj_dim": 32,
        "bos_token_id": BOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
    }
    return OPTConfig(**(fields | text))


def _tiny_t5(**text: Any) -> T5Config:
    fields = {
        "vocab_size": _VOCAB_SIZE,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "bos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "decoder_start_token_id": PAD_TOKEN_ID,
    }
    return T5Config(**(fields | text))
