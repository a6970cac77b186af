"""The half that both models share: a vision encoder, learned queries and the Q-Former that reads with them.

`Blip2` adds a language model, `Blip2Retrieval` adds heads for image-text matching. This module also holds
the one rule about dtypes that they share (`VisionQFormer.cast`).

Source: arXiv:2301.12597, section 3.1. Axis letters: `blip2.py`.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from transformers import Blip2Config

from blip2_actor.models.qformer import QFormer
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.models.vision import PixelNormalizer, VisionEncoder

KEPT_IN_FLOAT32 = {"query_tokens", "qformer", "wo"}
"""Modules and parameters for which the range of float16 is too small (the reference's
`_keep_in_fp32_modules`). `wo` is in T5's layers."""


class VisionQFormer(nn.Module):
    """Images to query outputs."""

    normalizer: PixelNormalizer
    """Set when a checkpoint is loaded; mean and standard deviation come from its image processor."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        qformer_width = config.qformer_config.hidden_size
        self.vision = VisionEncoder(config.vision_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer_width))
        self.qformer = QFormer(config.qformer_config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation; in a float16 model some parts stay in float32 (see `cast`)."""
        return self.vision.class_embedding.dtype

    def cast(self, dtype: torch.dtype) -> Self:
        """Convert the weights to `dtype`, except in float16 those of `KEPT_IN_FLOAT32`."""
        self.to(dtype)
        if dtype is torch.float16:
            for name, parameter in self.named_parameters():
                if not KEPT_IN_FLOAT32.isdisjoint(name.split(".")):
                    parameter.data = parameter.data.float()
        return self

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode normalized images: float[B, 3, S, S] -> float[B, P, Dv]."""
        return self.vision(pixel_values)

    def qformer_features(self, image_embeds: Tensor, recorder: Recorder = NO_RECORDER) -> Tensor:
        """Let the learned queries read the images: float[B, P, Dv] -> float[B, Q, Dq].

        Args:
            image_embeds: from `image_features`.
            recorder: see `QFormer.forward`.
        """
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        return self.qformer(queries, image_embeds, recorder=recorder).to(image_embeds.dtype)
