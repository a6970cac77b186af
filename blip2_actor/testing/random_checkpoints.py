"""Random checkpoints of stated size, as ordinary folders that transformers and the engine both load."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

IMAGE_TOKEN_ID = 50265
"""As in blip2-opt-2.7b."""


def config(size: str) -> Blip2Config:
    """The configuration called `size`."""
    opt = {"vocab_size": 50304, "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 50118}
    if size == "midsize":
        return _blip2(
            Blip2VisionConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            ),
            Blip2QFormerConfig(encoder_hidden_size=768),
            OPTConfig(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, **opt),
        )
    if size == "blip2-opt-2.7b":
        text = OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, **opt)
        return _blip2(Blip2VisionConfig(), Blip2QFormerConfig(), text)
    if size == "blip2-flan-t5-xl":
        text_config = T5Config(
            vocab_size=32128,
            d_model=2048,
            d_kv=64,
            d_ff=5120,
            num_layers=24,
            num_heads=32,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            bos_token_id=1,
            decoder_start_token_id=0,
        )
        return _blip2(Blip2VisionConfig(), Blip2QFormerConfig(), text_config, image_token_id=32100)
    raise ValueError(f"size must be midsize, blip2-opt-2.7b or blip2-flan-t5-xl, got {size!r}")


def checkpoint(size: str, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """Write the random checkpoint, if it is not there yet, and return its folder."""
    path = folder / f"{size}-{str(dtype).removeprefix('torch.')}"
    if (path / "config.json").exists():
        return path
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config(size))
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    _fill(model)
    model.save_pretrained(path)
    _tokenizer(config(size)).save_pretrained(path)
    del model
    gc.collect()  # modules refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the contenders are other processes, and size themselves by what is free
    return path


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """transformers' own start is degenerate: all queries alike, almost no vision."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
        else:
            parameter.normal_(0, 0.02)


def _blip2(vision: Any, qformer: Any, text: Any, image_token_id: int = IMAGE_TOKEN_ID) -> Blip2Config:
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=32,
        image_token_index=image_token_id,
    )


def _tokenizer(described: Blip2Config) -> PreTrainedTokenizerFast:
    """Bytes as tokens; ids of the special tokens as the configuration says."""
    text = described.text_config
    start, end = ("<start>", text.bos_token_id), ("<end>", text.eos_token_id)
    if text.model_type == "t5":
        start = end
    vocab = {start[0]: start[1], end[0]: end[1], "<image>": described.image_token_index}
    vocab.update({letter: 100 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))})
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = "<end>" if text.model_type == "t5" else "<start>"
    template = "$A <end>" if text.model_type == "t5" else "<start> $A"
    special = [(single, vocab[single])]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
