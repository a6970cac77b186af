"""A checkpoint's folder to a model on its device, in its dtype."""

from __future__ import annotations

import torch

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.download import CACHE_FOLDER
from blip2_actor.checkpoints.weights import (
    load_weights,
    opt_rules,
    retrieval_rules,
    stored_parameters,
    t5_rules,
)
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.retrieval import Blip2Retrieval
from blip2_actor.models.vision import PixelNormalizer

LANGUAGE_RULES = {"opt": opt_rules, "t5": t5_rules}
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.embed_tokens.weight"
"""A checkpoint that stores both does not share them, whatever its configuration says (Flan-T5's does not)."""


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, device_map: str | None = None
) -> Blip2:
    """Build the captioning model without memory, then let each tensor find its place.

    Args:
        checkpoint: of a model that writes text.
        device: where the model is, or its inputs where `device_map` splits it.
        dtype: of the weights, but for what must stay in another.
        device_map: as in `EngineConfig.device_map`.

    Raises:
        ValueError: the tensors are not those of the configuration, or the map's names not the model's.
        OSError: a file is missing or broken.
    """
    config = checkpoint.config
    with torch.device("meta"):
        model = Blip2(config)
    model.cast(dtype)
    split = None
    if device_map is not None:
        from blip2_actor.checkpoints.device_map import Split  # accelerate, which nothing else needs

        split = Split(model, device_map, device, CACHE_FOLDER / "offload")
    if split is None:
        model.to_empty(device=device)
    else:
        split.materialize()
    model.eval().requires_grad_(False)
    rules = LANGUAGE_RULES[config.text_config.model_type](config.qformer_config.cross_attention_frequency)
    has_own_head = {HEAD, EMBEDDINGS} <= set(stored_parameters(checkpoint.folder, rules))
    language_model = model.language_model
    if config.text_config.tie_word_embeddings and not has_own_head:
        language_model.tie_weights()
    load_weights(model, checkpoint.folder, rules)
    if has_own_head and torch.equal(language_model.lm_head.weight, language_model.embed_tokens.weight):
        language_model.tie_weights()
    if split is not None:
        split.attach()
    model.normalizer = PixelNormalizer(**checkpoint.image_processor).to(device)
    return model


def load_retrieval(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Blip2Retrieval:
    """The same for a checkpoint of image-text retrieval; raises the same."""
    config = checkpoint.retrieval_config
    with torch.device("meta"):
        model = Blip2Retrieval(config)
    model = model.cast(dtype).to_empty(device=device).eval().requires_grad_(False)
    load_weights(model, checkpoint.folder, retrieval_rules(config.qformer_config.cross_attention_frequency))
    model.normalizer = PixelNormalizer(**checkpoint.image_processor).to(device)
    return model
