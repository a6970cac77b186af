"""OPT, the language model of BLIP-2's decoder-only checkpoints, with a slot of the KV cache per text.

`prefill` runs prefixes (projected queries and prompt) through the layers and writes their keys and values
into slots; `decode` advances every running slot by one token. Prefixes of different lengths are packed one
after the other: the linear layers see no padding, and attention runs once per length.

Source: arXiv:2205.01068; transformers `OPTForCausalLM`. Axis letters: `blip2.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from blip2_actor.models.kv_cache import KVCache
from blip2_actor.models.layers import Embedding, Layers, Linear
from blip2_actor.models.packing import Packing
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.models.residual import multiply_norm, normalize

POSITION_OFFSET = 2
"""The first two rows of the position table are for padding (`OPTLearnedPositionalEmbedding`)."""


class OptLayer(nn.Module):
    """One decoder layer; the norms come before (most sizes) or after (350m) attention and MLP."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.num_heads = config.num_attention_heads
        self.norm_before = config.do_layer_norm_before
        self.self_attn_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.qkv = Linear(width, 3 * width, bias=config.enable_bias)
        self.out_proj = Linear(width, width, bias=config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = Linear(
            width, config.ffn_dim, bias=config.enable_bias, activation=config.activation_function
        )
        self.fc2 = Linear(config.ffn_dim, width, bias=config.enable_bias)

    def project(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream `hidden + update`, queries, and keys with values.

        float[..., D] each -> float[..., D], float[..., D], float[..., 2 D].
        """
        width = hidden.shape[-1]
        if self.norm_before:
            hidden, qkv = multiply_norm(self.self_attn_layer_norm, self.qkv, hidden, update)
        else:
            qkv = self.qkv(hidden)
        query, kv = qkv.split([width, 2 * width], dim=-1)
        return hidden, query, kv

    def finish(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply output projection, norms and MLP to the result of the attention (`context`).

        Returns:
            The residual stream in two parts, or in one (`residual.py`).
        """
        update = self.out_proj(context)
        if self.norm_before:
            hidden, inner = multiply_norm(self.final_layer_norm, self.fc1, hidden, update)
            return hidden, self.fc2(inner)
        _, hidden = normalize(self.self_attn_layer_norm, hidden, update)
        return normalize(self.final_layer_norm, hidden, self.fc2(self.fc1(hidden)))[1], None


class OptDecoder(nn.Module):
    """Embeddings, layers and head; `LanguageModel` says what its methods take and return.

    The same object serves `forward` (training) and slots (generation).
    """

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.max_positions: int | None = config.max_position_embeddings
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.layers: Layers[OptLayer] = Layers([OptLayer(config) for _ in range(config.num_hidden_layers)])
        has_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        affine = config.layer_norm_elementwise_affine
        self.final_layer_norm = (
            nn.LayerNorm(config.hidden_size, elementwise_affine=affine) if has_norm else None
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()

    def tie_weights(self) -> None:
        """Share the weight of the head with the embeddings; call it again after `to_empty`."""
        self.lm_head.weight = self.embed_tokens.weight

    def new_kv_cache(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> KVCache:
        weight, max_length = self.embed_positions.weight, prefix_length + max_new_tokens
        return KVCache(len(self.layers), num_slots, max_length, weight.shape[1], weight.device, weight.dtype)

    def prefix_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids

    def cached_length(self, prefix_length: int) -> int:
        return prefix_length

    def _embed(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        return inputs_embeds + self.embed_positions(positions + POSITION_OFFSET)

    def _final_norm(self, hidden: Tensor, update: Tensor | None) -> Tensor:
        if self.final_layer_norm is not None:
            return normalize(self.final_layer_norm, hidden, update)[1]
        return hidden if update is None else hidden + update

    def _logits(self, hidden: Tensor, update: Tensor | None) -> Tensor:
        return self.lm_head(self._final_norm(hidden, update))

    def forward(self, prefix: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Compute the logits of texts that follow an image (teacher forcing).

        Args:
            prefix: float[B, Q, Dw], the projected queries.
            input_ids: int64[B, T], prompt and text.
            labels: int64[B, T], `input_ids` again, or -100 for tokens that do not count in the loss.

        Returns:
            float[B, T, V], logits that predict each label.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {list(input_ids.shape)}, got {list(labels.shape)}"
            )
        return torch.stack(self.predict(list(prefix), list(input_ids)))

    def predict(
        self, prefixes: list[Tensor], texts: list[Tensor], recorder: Recorder = NO_RECORDER
    ) -> list[Tensor]:
        """Compute the logits that predict given texts."""
        pairs = list(zip(prefixes, texts, strict=True))
        sequences = [torch.cat([prefix, self.embed_tokens(text[:-1])]) for prefix, text in pairs]
        packing = Packing([len(s) for s in sequences], prefixes[0].device)
        hidden = packing.unpack(self._run_packed(packing.pack(sequences), packing, recorder))
        predicting = [h[len(p) - 1 :][: len(t)] for h, (p, t) in zip(hidden, pairs, strict=True)]
        return list(self.lm_head(torch.cat(predicting)).split([len(t) for t in texts]))

    def text_features(self, texts: list[Tensor], recorder: Recorder = NO_RECORDER) -> list[Tensor]:
        """Return the last hidden states of texts without an image."""
        packing = Packing([len(text) for text in texts], texts[0].device)
        inputs_embeds = packing.pack([self.embed_tokens(text) for text in texts])
        return packing.unpack(self._run_packed(inputs_embeds, packing, recorder))

    def _run_packed(self, inputs_embeds: Tensor, packing: Packing, recorder: Recorder) -> Tensor:
        """Run all layers and the final norm over packed sequences, without a cache.

        float[T_total, Dw] -> float[T_total, Dw].
        """
        hidden = self._embed(inputs_embeds, packing.positions)
        recorder.hidden("language_model.embeddings", hidden)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            name = f"language_model.layers.{index}"
            hidden, query, kv = layer.project(hidden, update)
            context = packing.attend(query, kv, layer.num_heads, is_causal=True, recorder=recorder, name=name)
            hidden, update = layer.finish(hidden, context)
            recorder.hidden(name, hidden, update)
        hidden = self._final_norm(hidden, update)
        recorder.hidden("language_model.last_hidden_state", hidden)
        return hidden

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: KVCache) -> Tensor:
        """Run prefixes through the layers and write their keys and values into slots."""
        lengths, device = [len(p) for p in prefixes], prefixes[0].device
        packing = Packing(lengths, device)
        ends = Packing([1] * len(lengths), device, keys=lengths)
        hidden = self._embed(packing.pack(prefixes), packing.positions)
        groups = packing.slots_by_group(slots)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            hidden, query, kv = layer.project(hidden, update)
            for group, group_slots in zip(packing.groups, groups, strict=True):
                cache.write_prefix(index, group_slots, group.view(kv))
            if index == len(self.layers) - 1:  # from here on, only the last position of each prefix matters
                last = packing.last
                hidden = hidden[last]
                context = ends.attend(query[last], kv, layer.num_heads, over=packing)
            else:
                context = packing.attend(query, kv, layer.num_heads, is_causal=True)
            hidden, update = layer.finish(hidden, context)
        return self._logits(hidden, update)[packing.restore_order]

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: KVCache, kv_len: int) -> Tensor:
        """Append one token to each of the slots 0..R-1."""
        rows = cache.row_indices(lengths)
        attended = cache.attended(lengths + 1, kv_len)
        hidden = self._embed(self.embed_tokens(token_ids), lengths)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            hidden, query, kv = layer.project(hidden, update)
            cache.write_step(index, rows, kv)
            context = cache.attend(index, query, attended, layer.num_heads)
            hidden, update = layer.finish(hidden, context)
        return self._logits(hidden, update)
