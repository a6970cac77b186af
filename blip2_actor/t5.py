"""The T5 of BLIP-2's encoder-decoder checkpoints (Flan-T5), decoding in slots.

`prefill` runs prefixes (projected queries and prompt) through the encoder, leaves the cross-attention's
keys and values in slots, once per text, and decodes the start token; `decode` advances every running
slot by one token. Prefixes of different lengths are packed one behind the other, without padding.

Flan-T5's activations outgrow float16. In a float16 model the residual stream and `wo` are float32
(`T5.cast`), the gated product is taken in float32, and an attention output that overflows counts as the
largest float16. bfloat16 needs none of it and is what these checkpoints were trained in.

Source: arXiv:1910.10683, arXiv:2210.11416; transformers `T5ForConditionalGeneration`. Axis letters:
`model.py`; here D is H * E, which may differ from Dw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config

from blip2_actor.layers import Layers, Linear, find_activation, merge_heads
from blip2_actor.packing import Packing
from blip2_actor.slots import SlotCache

SCALE = 1.0
"""T5 does not scale attention scores; its initialisation does instead."""


class T5Norm(nn.Module):
    """Root mean square norm, computed in float32; the result has the dtype of the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, weight.shape, weight, self.eps).to(self.weight.dtype)


class T5Layer(nn.Module):
    """Self-attention, cross-attention where `reads_prefix` (the decoder), feed-forward; norms come first."""

    def __init__(self, config: T5Config, reads_prefix: bool) -> None:
        super().__init__()
        width, inner, eps = config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon
        self.attention_norm = T5Norm(width, eps)
        self.qkv = Linear(width, 3 * inner, bias=False)
        self.out_proj = Linear(inner, width, bias=False)
        if reads_prefix:
            self.cross_norm = T5Norm(width, eps)
            self.cross_query = Linear(width, inner, bias=False)
            self.cross_kv = Linear(width, 2 * inner, bias=False)
            self.cross_out_proj = Linear(inner, width, bias=False)
        self.mlp_norm = T5Norm(width, eps)
        self.is_gated = config.is_gated_act
        self.activation = find_activation(config.dense_act_fn)
        self.wi = Linear(width, config.d_ff * (2 if self.is_gated else 1), bias=False)
        self.wo = Linear(config.d_ff, width, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each position: float[..., Dw] -> three float[..., D]."""
        query, key, value = self.qkv(self.attention_norm(hidden)).chunk(3, -1)
        return query, key, value

    def project_prefix(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention's key and value of each prefix position: float[..., Dw] -> two float[..., D]."""
        key, value = self.cross_kv(encoded).chunk(2, -1)
        return key, value

    def project_cross(self, hidden: Tensor) -> Tensor:
        """Cross-attention's query: float[..., Dw] -> float[..., D]."""
        return self.cross_query(self.cross_norm(hidden))

    def add_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden + _bounded(self.out_proj(context))

    def add_cross(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden + _bounded(self.cross_out_proj(context))

    def add_mlp(self, hidden: Tensor) -> Tensor:
        inner = self.wi(self.mlp_norm(hidden)).to(self.wo.weight.dtype)
        if self.is_gated:
            gate, linear = inner.chunk(2, -1)
            return hidden + self.wo(self.activation(gate) * linear)
        return hidden + self.wo(self.activation(inner))


class T5Slots:
    """Keys and values of each running text: its own tokens (`own`) and its encoded prefix (`cross`)."""

    def __init__(self, own: SlotCache, cross: SlotCache) -> None:
        self.own = own
        self.cross = cross
        self.num_slots = own.num_slots
        self.prefix_lengths = torch.zeros(own.num_slots, dtype=torch.int64, device=own.keys.device)
        self._host_lengths = [0] * own.num_slots
        """`prefix_lengths`, known without asking the device."""

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return self.own.holds(1, max_new_tokens) and self.cross.holds(prefix_length, 0)

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        if not self.own.holds(1, max_new_tokens):
            self.own.grow(1, max_new_tokens)
        if not self.cross.holds(prefix_length, 0):
            self.cross.grow(prefix_length, 0)

    def occupy(self, slots: list[int], prefix_lengths: list[int]) -> None:
        """Note how long the prefixes in `slots` are."""
        for slot, length in zip(slots, prefix_lengths, strict=True):
            self._host_lengths[slot] = length
        device = self.prefix_lengths.device
        self.prefix_lengths[torch.tensor(slots, device=device)] = torch.tensor(prefix_lengths, device=device)

    def fork(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts, prefixes too; overlapping sources and targets are safe."""
        prefix_lengths = [self._host_lengths[slot] for slot in sources]
        self.own.fork(sources, targets, length)
        self.cross.fork(sources, targets, max(prefix_lengths))
        self.occupy(targets, prefix_lengths)

    def reorder(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy the texts' own positions [start, stop); slots of one image share their prefix already."""
        self.own.reorder(sources, targets, start, stop)

    def prefix_reach(self, num_rows: int) -> tuple[int, bool]:
        """Longest prefix in the first slots, and whether all are that long.

        The shape of a decode step follows from these (and from R and `max_length`).
        """
        lengths = self._host_lengths[:num_rows]
        return max(lengths), len(set(lengths)) == 1


class T5(nn.Module):
    """Embeddings, encoder, decoder and head. One object serves teacher forcing and slots."""

    max_positions: int | None = None
    """Positions are relative: a text of any length has a bias."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder: Layers[T5Layer] = Layers(
            [T5Layer(config, reads_prefix=False) for _ in range(config.num_layers)]
        )
        self.encoder_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.encoder_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.decoder: Layers[T5Layer] = Layers(
            [T5Layer(config, reads_prefix=True) for _ in range(config.num_decoder_layers)]
        )
        self.decoder_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.decoder_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the head with the embeddings; needed again after `to_empty`."""
        self.lm_head.weight = self.embed_tokens.weight

    def cast(self, dtype: torch.dtype) -> T5:
        """To `dtype`, but for what float16 is too small for."""
        self.to(dtype)
        if dtype is torch.float16:
            for layer in (*self.encoder, *self.decoder):
                layer.wo.float()
        return self

    def new_slots(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> T5Slots:
        weight = self.embed_tokens.weight
        own, cross = (
            SlotCache(
                len(self.decoder),
                num_slots,
                length,
                self.num_heads * self.config.d_kv,
                weight.device,
                weight.dtype,
            )
            for length in (1 + max_new_tokens, prefix_length)
        )
        return T5Slots(own, cross)

    def context_ids(self, input_ids: list[int]) -> list[int]:
        return [self.config.decoder_start_token_id]

    def cached_length(self, prefix_length: int) -> int:
        """The start token alone; the prefix is in the cross-attention's slots."""
        return 1

    def forward(self, prefix: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing: the encoder reads image and prompt, the decoder predicts the labels.

        Args:
            prefix: float[B, Q, Dw], the projected queries.
            input_ids: int64[B, T], the prompt.
            labels: int64[B, U], the text; -100 where no loss is wanted.

        Returns:
            float[B, U, V], logits that predict each label.
        """
        prefixes = torch.cat([prefix, self.embed_tokens(input_ids)], dim=1)
        texts = labels.masked_fill(labels == -100, self.config.pad_token_id)
        return torch.stack(self.predict(list(prefixes), list(texts)))

    def predict(self, prefixes: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
        """Logits that predict each token of given texts: float[T_i, Dw] and int64[U_i] -> float[U_i, V]."""
        lengths = [(len(p), len(t)) for p, t in zip(prefixes, texts, strict=True)]
        prefix_packing, packing = (
            Packing(list(x), prefixes[0].device, lengths) for x in zip(*lengths, strict=True)
        )
        start = texts[0].new_tensor([self.config.decoder_start_token_id])
        inputs = self.embed_tokens(packing.pack([torch.cat([start, text])[:-1] for text in texts]))
        encoded = self._encode(prefixes, prefix_packing)
        return packing.unpack(self._logits(self._decode_packed(inputs, packing, encoded, prefix_packing)))

    def text_features(self, texts: list[Tensor]) -> list[Tensor]:
        """What the encoder makes of texts alone: int64[T_i] each -> float[T_i, Dw] each."""
        packing = Packing([len(text) for text in texts], texts[0].device)
        return packing.unpack(self._encode([self.embed_tokens(text) for text in texts], packing))

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: T5Slots) -> Tensor:
        """Encode prefixes, leave their keys and values in slots, and decode the start token.

        Args:
            prefixes: float[T_i, Dw] each; lengths may differ.
            slots: one per prefix.
            cache: from `new_slots`.

        Returns:
            float[n, V], logits of the first new token of each text.
        """
        lengths = [len(p) for p in prefixes]
        device = prefixes[0].device
        prefix_packing = Packing(lengths, device)
        packing = Packing([1] * len(lengths), device, [(length,) for length in lengths])
        start = torch.full((len(lengths),), self.config.decoder_start_token_id, device=device)
        encoded = self._encode(prefixes, prefix_packing)
        cache.occupy(slots, lengths)
        hidden = self._decode_packed(
            self.embed_tokens(start), packing, encoded, prefix_packing, cache, packing.slots_by_group(slots)
        )
        return self._logits(hidden)[packing.restore_order]

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: T5Slots, max_length: int) -> Tensor:
        """Advance slots 0..R-1 by one token each.

        Args:
            token_ids: int64[R], the token to append to each slot.
            lengths: int64[R], positions already in each slot, the start token included.
            cache: the slots.
            max_length: the greatest of `lengths`, known to the host (no synchronisation here).

        Returns:
            float[R, V], logits behind the appended tokens.
        """
        num_rows, reach = token_ids.shape[0], max_length + 1
        prefix_reach, is_uniform = cache.prefix_reach(num_rows)
        rows = cache.own.row_indices(lengths)
        bias = self._causal_bias(lengths, reach).transpose(0, 1)[:, :, None]  # float[R, H, 1, reach]
        in_prefix = torch.arange(prefix_reach, device=lengths.device) < cache.prefix_lengths[:num_rows, None]
        cross_mask = None if is_uniform else in_prefix[:, None, None]
        hidden = self._enter(self.embed_tokens(token_ids))
        for index, layer in enumerate(self.decoder):
            query, key, value = layer.project(hidden)
            cache.own.write_step(index, rows, key, value)
            keys_values = cache.own.read(index, num_rows, reach, self.num_heads)
            hidden = layer.add_attention(hidden, self._attend_slots(query, keys_values, bias))
            keys_values = cache.cross.read(index, num_rows, prefix_reach, self.num_heads)
            context = self._attend_slots(layer.project_cross(hidden), keys_values, cross_mask)
            hidden = layer.add_mlp(layer.add_cross(hidden, context))
        return self._logits(self.decoder_norm(hidden))

    def _enter(self, embeds: Tensor) -> Tensor:
        """Embeddings as the start of the residual stream, in the dtype that it is kept in."""
        return embeds.to(next(iter(self.decoder)).wo.weight.dtype)

    def _encode(self, prefixes: list[Tensor], packing: Packing) -> Tensor:
        """float[T_i, Dw] each -> float[T_total, Dw], packed, behind the encoder's norm."""
        hidden = self._enter(packing.pack(prefixes))
        positions = torch.arange(max(len(p) for p in prefixes), device=hidden.device)
        buckets = self._buckets(positions[None, :] - positions[:, None], is_bidirectional=True)
        bias = self.encoder_bias(buckets).permute(2, 0, 1).contiguous()
        for layer in self.encoder:
            query, key, value = layer.project(hidden)
            context = packing.attend(query, key, value, self.num_heads, bias=bias, scale=SCALE)
            hidden = layer.add_mlp(layer.add_attention(hidden, context))
        return self.encoder_norm(hidden)

    def _decode_packed(
        self,
        inputs_embeds: Tensor,
        packing: Packing,
        encoded: Tensor,
        prefix_packing: Packing,
        cache: T5Slots | None = None,
        slots_by_group: list[Tensor] | None = None,
    ) -> Tensor:
        """The decoder over whole texts; keys and values are left in slots where there is a cache.

        float[U_total, Dw] and float[T_total, Dw] -> float[U_total, Dw], behind the decoder's norm.
        """
        hidden = self._enter(inputs_embeds)
        longest = max(group.length for group in packing.groups)
        bias = self._causal_bias(torch.arange(longest, device=hidden.device), longest).contiguous()
        for index, layer in enumerate(self.decoder):
            query, key, value = layer.project(hidden)
            cross_key, cross_value = layer.project_prefix(encoded)
            if cache is not None and slots_by_group is not None:
                for slots, text, prefix in zip(
                    slots_by_group, packing.groups, prefix_packing.groups, strict=True
                ):
                    cache.own.write_prefix(index, slots, text.view(key), text.view(value))
                    cache.cross.write_prefix(index, slots, prefix.view(cross_key), prefix.view(cross_value))
            context = packing.attend(query, key, value, self.num_heads, bias=bias, scale=SCALE)
            hidden = layer.add_attention(hidden, context)
            context = packing.attend_across(
                prefix_packing, layer.project_cross(hidden), cross_key, cross_value, self.num_heads, SCALE
            )
            hidden = layer.add_mlp(layer.add_cross(hidden, context))
        return self.decoder_norm(hidden)

    def _attend_slots(self, query: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """One query per slot: float[R, D] -> float[R, D]."""
        query = query.unflatten(-1, (self.num_heads, 1, -1))
        context = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, scale=SCALE)
        return merge_heads(context).flatten(1)

    def _causal_bias(self, positions: Tensor, reach: int) -> Tensor:
        """Bias of the decoder's self-attention, -inf at what comes later.

        int64[N] positions of the queries -> float[H, N, reach].
        """
        relative = torch.arange(reach, device=positions.device) - positions[:, None]
        bias = self.decoder_bias(self._buckets(relative, is_bidirectional=False)).permute(2, 0, 1)
        return bias.masked_fill(relative > 0, float("-inf"))

    def _buckets(self, relative: Tensor, is_bidirectional: bool) -> Tensor:
        """Key position minus query position -> row of the bias table.

        Half of the rows are for one distance each, the rest for ranges that grow with the logarithm. The
        float32 arithmetic is the reference's, step by step: another order moves the borders of the ranges.
        """
        num_buckets, farthest = (
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        if is_bidirectional:
            num_buckets //= 2
            offset, distance = (relative > 0).long() * num_buckets, relative.abs()
        else:
            offset, distance = 0, (-relative).clamp(min=0)
        num_exact = num_buckets // 2
        ratio = torch.log(distance.float() / num_exact) / math.log(farthest / num_exact)
        far = num_exact + (ratio * (num_buckets - num_exact)).long()
        return offset + torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Checkpoints with tied heads were trained on scaled outputs (`scale_decoder_outputs`)."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return self.lm_head(hidden)


def _bounded(update: Tensor) -> Tensor:
    """An overflow in float16 as its largest number; element by element, so that no neighbour is touched."""
    if update.dtype is not torch.float16:
        return update
    largest = torch.finfo(torch.float16).max
    return update.clamp(-largest, largest)
