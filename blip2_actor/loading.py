"""A checkpoint's folder to a model on its device, in its dtype."""

from __future__ import annotations

import torch

from blip2_actor.checkpoint import Checkpoint
from blip2_actor.model import Blip2
from blip2_actor.vision import PixelNormalizer
from blip2_actor.weights import load_weights, opt_rules


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Blip2:
    """Build the model without memory, then let each tensor find its place.

    Raises:
        ValueError: the tensors are not those of the configuration.
        OSError: a file is missing or broken.
    """
    config = checkpoint.config
    with torch.device("meta"):
        model = Blip2(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.language_model.tie_weights()
    load_weights(model, checkpoint.folder, opt_rules(config.qformer_config.cross_attention_frequency))
    model.normalizer = PixelNormalizer(**checkpoint.image_processor).to(device)
    return model
