"""BLIP-2 whole: vision encoder, Q-Former, projection, language model (arXiv:2301.12597).

Axis letters, for every file of this package:

    B  images            S  side of the square image, px     P  image tokens (class token + patches)
    Q  queries           T  text tokens                      L  positions in a slot
    R  running texts     V  vocabulary                       H  heads, E  channels of one head
    Dv vision width      Dq Q-Former width                   Dw width of word embeddings
    D  width of the layer at hand
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2Config

from blip2_actor.models.layers import Linear
from blip2_actor.models.opt import OptDecoder
from blip2_actor.models.qformer import QFormer
from blip2_actor.models.t5 import T5
from blip2_actor.models.vision import PixelNormalizer, VisionEncoder

LANGUAGE_MODELS: dict[str, type[OptDecoder] | type[T5]] = {"opt": OptDecoder, "t5": T5}
"""By `model_type` of the text configuration."""


class Blip2(nn.Module):
    """The captioning model: images (and a prompt) to text."""

    normalizer: PixelNormalizer
    """Set when a checkpoint is loaded: its mean and deviation are the image processor's."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        qformer_width = config.qformer_config.hidden_size
        self.vision = VisionEncoder(config.vision_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer_width))
        self.qformer = QFormer(config.qformer_config)
        self.language_projection = Linear(qformer_width, config.text_config.hidden_size)
        self.language_model = LANGUAGE_MODELS[config.text_config.model_type](config.text_config)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; in a float16 model some parts keep float32 (see `cast`)."""
        return self.vision.class_embedding.dtype

    def cast(self, dtype: torch.dtype) -> Blip2:
        """To `dtype`, but for what float16 is too small for."""
        self.to(dtype)
        self.language_model.cast(dtype)
        if dtype is torch.float16:
            self.qformer.float()
            self.query_tokens = nn.Parameter(self.query_tokens.float())
        return self

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, P, Dv]."""
        return self.vision(pixel_values)

    def qformer_features(
        self, image_embeds: Tensor, record: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """float[B, P, Dv] -> float[B, Q, Dq]."""
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        return self.qformer(queries, image_embeds, record=record).to(image_embeds.dtype)

    def project(self, qformer_features: Tensor) -> Tensor:
        """What the language model sees of an image: float[B, Q, Dq] -> float[B, Q, Dw]."""
        return self.language_projection(qformer_features)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """int64[..., T] -> float[..., T, Dw]."""
        return self.language_model.embed_tokens(token_ids)

    def prefix_ids(self, prompt_ids: list[int]) -> list[int]:
        """What the reference's logits processors see before the first new token."""
        image_token_id = self.config.image_token_index
        image_ids = [] if image_token_id is None else [image_token_id] * self.config.num_query_tokens
        return self.language_model.prefix_ids(image_ids + prompt_ids)

    def text_features(self, texts: list[Tensor]) -> list[Tensor]:
        """Texts alone, as the language model (T5: its encoder) reads them: int64[T_i] -> float[T_i, Dw]."""
        return self.language_model.text_features(texts)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits for a text that belongs to an image, and the mean loss.

        Args:
            pixel_values: float[B, 3, S, S], normalised.
            input_ids: int64[B, T], without image tokens: prompt and text for OPT, the prompt for T5.
            labels: int64[B, U], -100 where no loss is wanted: for OPT aligned with `input_ids` (U is T, the
                last query predicts the first one), for T5 the text; None takes `input_ids`.

        Returns:
            float[] mean loss over the labels, and float[B, U, V] logits that predict them.
        """
        labels = input_ids if labels is None else labels
        prefix = self.project(self.qformer_features(self.image_features(pixel_values)))
        logits = self.language_model(prefix, input_ids, labels)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100), logits
