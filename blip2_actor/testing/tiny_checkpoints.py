"""Tiny random BLIP-2 checkpoints, saved by transformers, for comparison with it."""

from __future__ import annotations

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

NUM_QUERIES = 5
IMAGE_SIZE_PX = 28
BOS, PAD, EOS, IMAGE = 2, 1, 3, 4
SPECIALS = {"<unk>": 0, "<pad>": PAD, "</s>": BOS, "<end>": EOS, "<image>": IMAGE}
VOCAB_SIZE = 264


def make_tokenizer(language: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens; OPT's puts `</s>` first, T5's puts `<end>` last, as the published ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**SPECIALS, **{letter: len(SPECIALS) + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single, special = ("</s> $A", ("</s>", BOS)) if language == "opt" else ("$A <end>", ("<end>", EOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def make_config(language: str = "opt", image_token: bool = True, **text: Any) -> Blip2Config:
    if language == "opt":
        text_config: Any = OPTConfig(
            **{
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_position_embeddings": 96,
                "word_embed_proj_dim": 32,
                "bos_token_id": BOS,
                "pad_token_id": PAD,
                "eos_token_id": EOS,
                **text,
            }
        )
    else:
        text_config = T5Config(
            **{
                "vocab_size": VOCAB_SIZE,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 3,
                "num_heads": 4,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
                "bos_token_id": EOS,
                "pad_token_id": PAD,
                "eos_token_id": EOS,
                "decoder_start_token_id": PAD,
                **text,
            }
        )
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE_PX,
        patch_size=7,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=VOCAB_SIZE,
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
        text_config=text_config,
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE if image_token else None,
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Fill all weights: transformers' own start is degenerate (all queries alike, almost no vision)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(1 + noise if is_norm else noise)


def save_checkpoint(
    folder: Path, language: str = "opt", image_token: bool = True, seed: int = 0, **text: Any
) -> Path:
    """A random checkpoint as transformers itself writes it."""
    model = Blip2ForConditionalGeneration(make_config(language, image_token, **text)).eval()
    if language == "t5" and not model.config.text_config.scale_decoder_outputs:
        # transformers ties every new T5; a head of its own comes with a checkpoint that stores one.
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    randomize(model, seed)
    model.save_pretrained(folder)
    make_tokenizer(language).save_pretrained(folder)
    return folder


def images(count: int, seed: int = 0) -> torch.Tensor:
    """uint8[count, S, S, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (count, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), generator=generator, dtype=torch.uint8
    )
