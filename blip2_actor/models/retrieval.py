"""Image-text matching and contrastive scores, from BLIP-2's retrieval checkpoints (blip2-itm-vit-g).

There is no language model: the Q-Former reads the text itself, behind its queries (matching: the text
sees the image through them) or alone (contrastive: two embeddings whose product is the score).

Source: arXiv:2301.12597, section 3.2; transformers `Blip2ForImageTextRetrieval`. Axis letters:
`model.py`, and De for the width of the shared embedding space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2Config

from blip2_actor.models.layers import Linear
from blip2_actor.models.qformer import QFormer
from blip2_actor.models.vision import PixelNormalizer, VisionEncoder
from blip2_actor.transfer import to_device


class Blip2Retrieval(nn.Module):
    """Images and texts to scores of how well they fit."""

    normalizer: PixelNormalizer
    """Set when a checkpoint is loaded."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        qformer = config.qformer_config
        self.vision = VisionEncoder(config.vision_config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer.hidden_size))
        self.word_embeddings = nn.Embedding(qformer.vocab_size, qformer.hidden_size)
        self.position_embeddings = nn.Embedding(qformer.max_position_embeddings, qformer.hidden_size)
        self.qformer = QFormer(qformer)
        self.vision_projection = Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.text_projection = Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.itm_head = Linear(qformer.hidden_size, 2)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; in a float16 model some parts keep float32 (see `cast`)."""
        return self.vision.class_embedding.dtype

    def cast(self, dtype: torch.dtype) -> Blip2Retrieval:
        """To `dtype`, but for what float16 is too small for."""
        self.to(dtype)
        if dtype is torch.float16:
            self.qformer.float()
            self.query_tokens = nn.Parameter(self.query_tokens.float())
        return self

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, S, S] -> float[B, P, Dv]."""
        return self.vision(pixel_values)

    def matching_logits(self, image_embeds: Tensor, texts: list[Tensor]) -> Tensor:
        """Does each text describe its image? Softmax gives the probabilities of no and yes.

        Args:
            image_embeds: float[B, P, Dv], from `image_features`.
            texts: int64[T_i] each, one per image, without image tokens.

        Returns:
            float[B, 2], no and yes.

        Raises:
            ValueError: a text is longer than the Q-Former has positions.
        """
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        num_queries = queries.shape[1]
        embeds, mask = self._embed(texts)
        hidden = self.qformer(
            torch.cat([queries, embeds], dim=1),
            image_embeds,
            num_queries,
            F.pad(mask, (num_queries, 0), value=True),
        )
        return self.itm_head(hidden[:, :num_queries].to(image_embeds.dtype)).mean(dim=1)

    def image_embeddings(self, image_embeds: Tensor) -> Tensor:
        """Unit vectors of each image, one per query: float[B, P, Dv] -> float[B, Q, De]."""
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        features = self.qformer(queries, image_embeds).to(image_embeds.dtype)
        return F.normalize(self.vision_projection(features), dim=-1)

    def text_embeddings(self, texts: list[Tensor]) -> Tensor:
        """Unit vectors of texts, taken at their first token: int64[T_i] each -> float[N, De].

        Raises:
            ValueError: a text is longer than the Q-Former has positions.
        """
        embeds, mask = self._embed(texts)
        hidden = self.qformer(embeds, num_queries=0, mask=mask)
        return F.normalize(self.text_projection(hidden[:, 0].to(embeds.dtype)), dim=-1)

    @staticmethod
    def contrastive_scores(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Cosine of each image's best query with its text.

        float[N, Q, De], float[N, De] -> float[N] in [-1, 1].
        """
        return torch.einsum("nqd,nd->nq", image_embeddings, text_embeddings).amax(dim=1)

    def _embed(self, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Embedded texts, float[N, T, Dq], and where they are, bool[N, T]."""
        lengths = to_device([len(text) for text in texts], texts[0].device)
        longest, limit = max(len(text) for text in texts), self.position_embeddings.num_embeddings
        if longest > limit:
            raise ValueError(f"text must be at most {limit} tokens, got {longest}; shorten it")
        positions = torch.arange(longest, device=lengths.device)
        embeds = self.word_embeddings(pad_sequence(texts, batch_first=True)) + self.position_embeddings(
            positions
        )
        return embeds, positions < lengths[:, None]
