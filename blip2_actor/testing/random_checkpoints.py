"""Checkpoints with random weights at the sizes of published models, for measuring speed.

The speed of a model does not depend on its weights, so a benchmark needs no download.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from blip2_actor.checkpoints.weights.write_weights import write_safetensors
from blip2_actor.testing.random_weights import random_weights
from blip2_actor.testing.tokenizer import IMAGE_TOKEN, byte_tokenizer

_OPT_IDS = {"vocab_size": 50304, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 50118}
"""As in blip2-opt-2.7b, and so are the image token and the number of queries below."""
_OPT_IMAGE_TOKEN_ID = 50265
_T5_IMAGE_TOKEN_ID = 32100
_NUM_QUERIES = 32
SHARD_BYTES = 1 << 30
_FIRST_BYTE_ID = 100
_OPT_SIZES = {
    "blip2-opt-2.7b": {"hidden_size": 2560, "num_layers": 32, "num_heads": 32},
    "blip2-opt-6.7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32},
}
_T5_SIZES = {
    "blip2-flan-t5-xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "blip2-flan-t5-xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
}


def random_config(size: str) -> Blip2Config:
    """Return the configuration of a model of a named size.

    Args:
        size: "midsize" (12 layers of 768 in the vision encoder and in OPT), or the name of a published model:
            "blip2-opt-2.7b", "blip2-opt-6.7b", "blip2-flan-t5-xl" or "blip2-flan-t5-xxl".

    Raises:
        ValueError: there is no such size.
    """
    vision, qformer, image_token_id = Blip2VisionConfig(), Blip2QFormerConfig(), _OPT_IMAGE_TOKEN_ID
    text: OPTConfig | T5Config
    if size == "midsize":
        vision = Blip2VisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        qformer = Blip2QFormerConfig(encoder_hidden_size=768)
        text = _opt(hidden_size=768, num_layers=12, num_heads=12)
    elif size in _OPT_SIZES:
        text = _opt(**_OPT_SIZES[size])
    elif size in _T5_SIZES:
        image_token_id = _T5_IMAGE_TOKEN_ID
        text = T5Config(
            vocab_size=32128,
            d_kv=64,
            num_layers=24,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            bos_token_id=1,
            decoder_start_token_id=0,
            **_T5_SIZES[size],
        )
    else:
        sizes = ", ".join(["midsize", *_OPT_SIZES, *_T5_SIZES])
        raise ValueError(f"size must be one of {sizes}; got {size!r}")
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=_NUM_QUERIES,
        image_token_index=image_token_id,
    )


def _opt(*, hidden_size: int, num_layers: int, num_heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        **_OPT_IDS,
    )


def save_random_checkpoint(size: str, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """Write a random checkpoint, unless an earlier call has written it.

    One shard at a time is in memory.

    Args:
        size: as for `random_config`.
        folder: folder that keeps the checkpoints; each has a folder of its own inside.
        device: where the random numbers are made; a GPU is much faster for large models.
        dtype: dtype of the stored weights.

    Returns:
        The folder of the checkpoint.
    """
    path = folder / f"{size}-{str(dtype).removeprefix('torch.')}"
    if (path / "config.json").exists():
        return path
    config = random_config(size)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model = model.to(dtype)
    model.tie_weights()
    path.mkdir(parents=True, exist_ok=True)
    _save_shards(path, random_weights(model, torch.device(device), std=0.02, vector_std=0))
    random_tokenizer(config).save_pretrained(path)
    model.generation_config.save_pretrained(path)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(path)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other processes use this GPU next, and size themselves by its free memory
    return path


def _save_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write weights as they come into files of about `SHARD_BYTES`, and the index that names them."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def save() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, values in weights:
        shard[name] = values
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            save()
    if shard:
        save()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tokenizer(config: Blip2Config) -> PreTrainedTokenizerFast:
    """Build a byte tokenizer with the special token ids of a configuration."""
    text = config.text_config
    special_ids = {"<end>": text.eos_token_id, IMAGE_TOKEN: config.image_token_index}
    if text.model_type == "t5":
        return byte_tokenizer(special_ids, _FIRST_BYTE_ID, "$A <end>", eos_token="<end>")
    special_ids = {"<start>": text.bos_token_id, **special_ids}
    return byte_tokenizer(special_ids, _FIRST_BYTE_ID, "<start> $A", eos_token="<end>")
