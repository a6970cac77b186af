"""The Q-Former of BLIP-2: learned queries that read the image through cross-attention.

It is a post-norm BERT whose queries cross-attend to the image in every second layer. In retrieval
checkpoints it also reads text: the text tokens follow the queries, share the self-attention with them, have
feed-forward weights of their own, and never see the image directly.

The keys and values of all cross-attentions depend only on the image, so one matrix product computes them all
(87 % of this module's arithmetic).

In a float16 model this module stays in float32, as in the reference (`_keep_in_fp32_modules`), because its
attention scores exceed the range of float16.

Source: arXiv:2301.12597, section 3.1; transformers `Blip2QFormerModel`. Axis letters: `blip2.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from blip2_actor.models.layers import Layers, Linear, attend, merge_heads, split_heads
from blip2_actor.models.recorder import NO_RECORDER, Recorder


class PostNormMlp(nn.Module):
    """BERT's feed-forward: two linear layers, the residual, then the norm."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.fc2(self.fc1(hidden)) + hidden)


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention if `reads_image`, feed-forward."""

    def __init__(self, config: Blip2QFormerConfig, reads_image: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.reads_image = reads_image
        self.qkv = Linear(width, 3 * width)
        self.attention_output = Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if reads_image:
            self.cross_query = Linear(width, width)
            self.cross_output = Linear(width, width)
            self.cross_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query_mlp = PostNormMlp(config)
        if config.use_qformer_text_input:
            self.text_mlp = PostNormMlp(config)

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        image_kv: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        recorder: Recorder,
        name: str,
    ) -> Tensor:
        """Run one layer over the queries and the text after them.

        Args:
            hidden: float[B, Q + T, Dq].
            num_queries: Q; 0 for text alone.
            image_kv: keys and values of this layer's cross-attention, each float[B, H, P, E], if it has one.
            mask: bool[B, 1, 1, Q + T], True for positions that may be attended to.
            recorder: takes both attentions.
            name: of this layer for the recorder.

        Returns:
            The new hidden states, float[B, Q + T, Dq].
        """
        query, key, value = split_heads(self.qkv(hidden), 3 * self.num_heads).chunk(3, dim=1)
        recorder.attention(f"{name}.self_attention", query, key, mask)
        context = attend(query, key, value, mask=mask)
        hidden = self.attention_norm(self.attention_output(merge_heads(context)) + hidden)
        if num_queries == 0:
            return self.text_mlp(hidden)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.reads_image:
            assert image_kv is not None, "queries need an image"
            query, (key, value) = split_heads(self.cross_query(queries), self.num_heads), image_kv
            recorder.attention(f"{name}.cross_attention", query, key)
            context = attend(query, key, value)
            queries = self.cross_norm(self.cross_output(merge_heads(context)) + queries)
        queries = self.query_mlp(queries)
        if text.shape[1] == 0:
            return queries
        return torch.cat([queries, self.text_mlp(text)], dim=1)


class QFormer(nn.Module):
    """Learned queries and an image in; what the queries read from the image out."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        readers = [i % config.cross_attention_frequency == 0 for i in range(config.num_hidden_layers)]
        self.layers: Layers[QFormerLayer] = Layers([QFormerLayer(config, reads) for reads in readers])
        self.cross_kv = Linear(config.encoder_hidden_size, 2 * sum(readers) * config.hidden_size)

    def image_keys_values(self, image_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute the keys and values of every cross-attention, in the order of the layers that have one.

        float[B, P, Dv] -> pairs of float[B, H, P, E].
        """
        width = self.layernorm.normalized_shape[0]
        parts = [split_heads(x, self.num_heads) for x in self.cross_kv(image_embeds).split(width, dim=-1)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def forward(
        self,
        query_embeds: Tensor,
        image_embeds: Tensor | None = None,
        num_queries: int | None = None,
        mask: Tensor | None = None,
        recorder: Recorder = NO_RECORDER,
    ) -> Tensor:
        """Let the learned queries read the image (BLIP-2, section 3.1).

        Args:
            query_embeds: float[B, Q + T, Dq], queries first, already expanded over the batch.
            image_embeds: float[B, P, Dv], the vision encoder's output after its final norm; None for text
                alone.
            num_queries: Q; None means that there is no text, and 0 that there is nothing else.
            mask: bool[B, Q + T], False for padding; None attends to all positions.
            recorder: takes the input of the first layer, and the output and the attentions of each.

        Returns:
            float[B, Q + T, Dq], in this module's dtype.
        """
        num_queries = query_embeds.shape[1] if num_queries is None else num_queries
        dtype = self.layernorm.weight.dtype
        image_kv = iter(self.image_keys_values(image_embeds.to(dtype)) if image_embeds is not None else ())
        mask = None if mask is None else mask[:, None, None, :]
        hidden = self.layernorm(query_embeds.to(dtype))
        recorder.hidden("qformer.embeddings", hidden)
        for index, layer in enumerate(self.layers):
            name = f"qformer.layers.{index}"
            kv = next(image_kv, None) if layer.reads_image else None
            hidden = layer(hidden, num_queries, kv, mask, recorder, name)
            recorder.hidden(name, hidden)
        return hidden
