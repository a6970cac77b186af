"""The demonstration's model: an ordinary BLIP-2 (ViT, Q-Former, OPT) of two million parameters.

It is built from transformers' own classes, so that the saved checkpoint is an ordinary one.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_actor.demo.examples import IMAGE_SIDE_PX, PATCH_PX
from blip2_actor.demo.tokenizer import IMAGE_TOKEN

WIDTH = 128
NUM_HEADS = 4
NUM_QUERY_TOKENS = 8
VISION_LAYERS = 4
QFORMER_LAYERS = 2
TEXT_LAYERS = 2
MAX_POSITIONS = 192
"""Maximum length of a text, image tokens included: enough for a prompt and a long answer."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> Blip2ForConditionalGeneration:
    """Build an untrained model; its weights come from torch's global generator."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=NUM_HEADS,
            image_size=IMAGE_SIDE_PX,
            patch_size=PATCH_PX,
            initializer_range=0.02,  # with the default of 1e-10, training from scratch fails
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=QFORMER_LAYERS,
            num_attention_heads=NUM_HEADS,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=4 * WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=NUM_HEADS,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    # Attention over 65 rows: on a CPU, plain matrix products train twice as fast as the fused kernel.
    model = Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    embeddings = model.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH_PX**2) ** -0.5)
    with torch.no_grad():  # transformers initializes all queries with zero, and they would stay equal
        model.query_tokens.normal_(std=0.5)
    model.generation_config.max_new_tokens = 30
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Blip2Processor:
    """Build the processor that is saved with the checkpoint."""
    side = {"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX}
    return Blip2Processor(BlipImageProcessorPil(size=side), tokenizer, num_query_tokens=NUM_QUERY_TOKENS)
