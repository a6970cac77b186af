"""Image-text matching and contrastive scores, with BLIP-2's retrieval checkpoints (blip2-itm-vit-g).

There is no language model; the Q-Former reads the text itself. For matching, the text follows the queries
and sees the image through them. For contrastive scores, the text is read alone, and the product of two
embeddings is the score.

Source: arXiv:2301.12597, section 3.2; transformers `Blip2ForImageTextRetrieval`. Axis letters: `blip2.py`,
and De for the width of the shared embedding space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2Config

from blip2_actor.models.layers import Embedding, Linear
from blip2_actor.models.vision_qformer import VisionQFormer
from blip2_actor.transfer import to_device


class Blip2Retrieval(VisionQFormer):
    """Scores how well images and texts match."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        qformer = config.qformer_config
        self.word_embeddings = Embedding(qformer.vocab_size, qformer.hidden_size)
        self.position_embeddings = Embedding(qformer.max_position_embeddings, qformer.hidden_size)
        self.vision_projection = Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.text_projection = Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.itm_head = Linear(qformer.hidden_size, 2)

    def matching_logits(self, image_embeds: Tensor, texts: list[Tensor]) -> Tensor:
        """Answer whether each text describes its image; softmax gives the probabilities of no and yes.

        Args:
            image_embeds: float[B, P, Dv], from `image_features`.
            texts: int64[T_i] each, one per image, without image tokens.

        Returns:
            float[B, 2], the logits of no and yes.

        Raises:
            ValueError: a text has more tokens than the Q-Former has positions.
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
        """Return unit vectors of images, one per query: float[B, P, Dv] -> float[B, Q, De]."""
        return F.normalize(self.vision_projection(self.qformer_features(image_embeds)), dim=-1)

    def text_embeddings(self, texts: list[Tensor]) -> Tensor:
        """Return unit vectors of texts, taken at their first token: int64[T_i] each -> float[N, De].

        Raises:
            ValueError: a text has more tokens than the Q-Former has positions.
        """
        embeds, mask = self._embed(texts)
        hidden = self.qformer(embeds, num_queries=0, mask=mask)
        return F.normalize(self.text_projection(hidden[:, 0].to(embeds.dtype)), dim=-1)

    @staticmethod
    def contrastive_scores(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Return the cosine of each image's best query with its text.

        float[N, Q, De], float[N, De] -> float[N], in [-1, 1].
        """
        return torch.einsum("nqd,nd->nq", image_embeddings, text_embeddings).amax(dim=1)

    def _embed(self, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the padded embeddings of texts, float[N, T, Dq], and bool[N, T], False for padding."""
        lengths = to_device([len(text) for text in texts], texts[0].device)
        longest, limit = max(len(text) for text in texts), self.position_embeddings.num_embeddings
        if longest > limit:
            raise ValueError(f"text must be at most {limit} tokens, got {longest}; shorten it")
        positions = torch.arange(longest, device=lengths.device)
        embeds = self.word_embeddings(pad_sequence(texts, batch_first=True)) + self.position_embeddings(
            positions
        )
        return embeds, positions < lengths[:, None]
