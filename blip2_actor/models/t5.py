"""T5, the language model of BLIP-2's encoder-decoder checkpoints (Flan-T5), with a slot per text.

`prefill` runs prefixes (projected queries and prompt) through the encoder, writes the keys and values of the
cross-attention into slots, once per text, and decodes the start token; `decode` advances every running slot
by one token. Prefixes of different lengths are packed one after the other, without padding.

Flan-T5's activations exceed the range of float16. In a float16 model the residual stream and `wo` are
float32 (`KEPT_IN_FLOAT32`), the gated product is computed in float32, and an attention output that overflows
is replaced by the largest float16. bfloat16 needs none of this; these checkpoints were trained in it.

Source: arXiv:1910.10683, arXiv:2210.11416; transformers `T5ForConditionalGeneration`. Axis letters:
`blip2.py`; here D is H * E, which may differ from Dw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import T5Config

from blip2_actor.models.kv_cache import KVCache, aligned_arange
from blip2_actor.models.layers import Embedding, Layers, Linear
from blip2_actor.models.packing import Packing
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.models.t5_kv_cache import T5KVCache
from blip2_actor.models.t5_layers import RelativeBias, T5Layer, T5Norm

SCALE = 1.0
"""T5 does not scale its attention scores; its initialization makes up for it."""


class T5(nn.Module):
    """Embeddings, encoder, decoder and head; `LanguageModel` says what its methods take and return.

    The same object serves `forward` (training) and slots (generation).
    """

    max_positions: int | None = None
    """None: positions are relative, and a text of any length has a bias."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.encoder: Layers[T5Layer] = Layers(
            [T5Layer(config, reads_prefix=False) for _ in range(config.num_layers)]
        )
        self.encoder_bias = RelativeBias(config, is_bidirectional=True)
        self.encoder_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.decoder: Layers[T5Layer] = Layers(
            [T5Layer(config, reads_prefix=True) for _ in range(config.num_decoder_layers)]
        )
        self.decoder_bias = RelativeBias(config, is_bidirectional=False)
        self.decoder_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the weight of the head with the embeddings; call it again after `to_empty`."""
        self.lm_head.weight = self.embed_tokens.weight

    def new_kv_cache(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> T5KVCache:
        weight = self.embed_tokens.weight
        own, cross = (
            KVCache(
                len(self.decoder),
                num_slots,
                length,
                self.num_heads * self.config.d_kv,
                weight.device,
                weight.dtype,
            )
            for length in (1 + max_new_tokens, prefix_length)
        )
        return T5KVCache(own, cross)

    def prefix_ids(self, input_ids: list[int]) -> list[int]:
        return [self.config.decoder_start_token_id]

    def cached_length(self, prefix_length: int) -> int:
        """Return 1, for the start token; the prefix is in the cache of the cross-attention."""
        return 1

    def forward(self, prefix: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Let the encoder read image and prompt, and the decoder predict the labels (teacher forcing).

        Args:
            prefix: float[B, Q, Dw], the projected queries.
            input_ids: int64[B, T], the prompt.
            labels: int64[B, U], the text, or -100 for tokens that do not count in the loss.

        Returns:
            float[B, U, V], logits that predict each label.
        """
        prefixes = torch.cat([prefix, self.embed_tokens(input_ids)], dim=1)
        texts = labels.masked_fill(labels == -100, self.config.pad_token_id)
        return torch.stack(self.predict(list(prefixes), list(texts)))

    def predict(
        self, prefixes: list[Tensor], texts: list[Tensor], recorder: Recorder = NO_RECORDER
    ) -> list[Tensor]:
        """Compute the logits that predict given texts."""
        lengths = [(len(p), len(t)) for p, t in zip(prefixes, texts, strict=True)]
        prefix_packing, packing = (
            Packing(list(x), prefixes[0].device, lengths) for x in zip(*lengths, strict=True)
        )
        start = texts[0].new_tensor([self.config.decoder_start_token_id])
        inputs = self.embed_tokens(packing.pack([torch.cat([start, text])[:-1] for text in texts]))
        encoded = self._encode(prefixes, prefix_packing, recorder)
        decoded = self._decode_packed(inputs, packing, encoded, prefix_packing, recorder=recorder)
        return packing.unpack(self._logits(decoded))

    def text_features(self, texts: list[Tensor], recorder: Recorder = NO_RECORDER) -> list[Tensor]:
        """Return the encoder's output for texts without an image."""
        packing = Packing([len(text) for text in texts], texts[0].device)
        return packing.unpack(self._encode([self.embed_tokens(text) for text in texts], packing, recorder))

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: T5KVCache) -> Tensor:
        """Encode prefixes, write their keys and values into slots, and decode the start token."""
        lengths = [len(p) for p in prefixes]
        device = prefixes[0].device
        prefix_packing = Packing(lengths, device)
        packing = Packing([1] * len(lengths), device, keys=lengths)
        start = torch.full((len(lengths),), self.config.decoder_start_token_id, device=device)
        groups = list(zip(packing.slots_by_group(slots), packing.groups, prefix_packing.groups, strict=True))
        cache.set_prefix_lengths(slots, lengths)

        def write(layer: int, kv: Tensor, cross_kv: Tensor) -> None:
            for group_slots, text, prefix in groups:
                cache.own.write_prefix(layer, group_slots, text.view(kv))
                cache.cross.write_prefix(layer, group_slots, prefix.view(cross_kv))

        encoded = self._encode(prefixes, prefix_packing)
        hidden = self._decode_packed(self.embed_tokens(start), packing, encoded, prefix_packing, write)
        return self._logits(hidden)[packing.restore_order]

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: T5KVCache, kv_len: int) -> Tensor:
        """Append one token to each of the slots 0..R-1."""
        prefixes = cache.attended_prefixes(token_ids.shape[0])
        rows = cache.own.row_indices(lengths)
        bias = self._causal_bias(lengths, kv_len).transpose(0, 1)  # float[R, H, >= kv_len]
        own = cache.own.attended(lengths + 1, kv_len, bias[:, :, None, :kv_len])
        hidden = self._to_residual_dtype(self.embed_tokens(token_ids))
        for index, layer in enumerate(self.decoder):
            query, kv = layer.project(hidden)
            cache.own.write_step(index, rows, kv)
            context = cache.own.attend(index, query, own, self.num_heads, SCALE)
            hidden = layer.add_attention(hidden, context)
            query = layer.project_cross(hidden)
            context = cache.cross.attend(index, query, prefixes, self.num_heads, SCALE)
            hidden = layer.add_mlp(layer.add_cross(hidden, context))
        return self._logits(self.decoder_norm(hidden))

    def _to_residual_dtype(self, embeds: Tensor) -> Tensor:
        """Convert embeddings to the dtype of the residual stream, which begins with them."""
        return embeds.to(next(iter(self.decoder)).wo.weight.dtype)

    def _encode(self, prefixes: list[Tensor], packing: Packing, recorder: Recorder = NO_RECORDER) -> Tensor:
        """Run the encoder, with its final norm: float[T_i, Dw] each -> packed, float[T_total, Dw]."""
        hidden = self._to_residual_dtype(packing.pack(prefixes))
        positions = torch.arange(max(len(p) for p in prefixes), device=hidden.device)
        bias = self.encoder_bias(
            aligned_arange(len(positions), hidden.device) - positions[:, None]
        ).contiguous()
        recorder.hidden("language_model.encoder.embeddings", hidden)
        for index, layer in enumerate(self.encoder):
            name = f"language_model.encoder.layers.{index}"
            query, kv = layer.project(hidden)
            context = packing.attend(
                query, kv, self.num_heads, bias=bias, scale=SCALE, recorder=recorder, name=name
            )
            hidden = layer.add_mlp(layer.add_attention(hidden, context))
            recorder.hidden(name, hidden)
        hidden = self.encoder_norm(hidden)
        recorder.hidden("language_model.encoder.last_hidden_state", hidden)
        return hidden

    def _decode_packed(
        self,
        inputs_embeds: Tensor,
        packing: Packing,
        encoded: Tensor,
        prefix_packing: Packing,
        write: Callable[[int, Tensor, Tensor], None] | None = None,
        recorder: Recorder = NO_RECORDER,
    ) -> Tensor:
        """Run the decoder, with its final norm, over whole texts.

        Args:
            inputs_embeds: float[U_total, Dw], packed texts.
            packing: of the texts.
            encoded: float[T_total, Dw], packed output of the encoder.
            prefix_packing: of `encoded`.
            write: called for each layer with its index and its keys and values: those of the
                self-attention and those of the cross-attention.
            recorder: takes the hidden states and the attentions of one text.

        Returns:
            float[U_total, Dw].
        """
        hidden = self._to_residual_dtype(inputs_embeds)
        longest = max(group.length for group in packing.groups)
        bias = self._causal_bias(torch.arange(longest, device=hidden.device), longest)
        recorder.hidden("language_model.decoder.embeddings", hidden)
        for index, layer in enumerate(self.decoder):
            name = f"language_model.decoder.layers.{index}"
            query, kv = layer.project(hidden)
            cross_kv = layer.cross_kv(encoded)
            if write is not None:
                write(index, kv, cross_kv)
            context = packing.attend(
                query, kv, self.num_heads, bias=bias, scale=SCALE, recorder=recorder, name=name
            )
            hidden = layer.add_attention(hidden, context)
            query = layer.project_cross(hidden)
            over = prefix_packing
            context = packing.attend(
                query, cross_kv, self.num_heads, over=over, scale=SCALE, recorder=recorder, name=name
            )
            hidden = layer.add_mlp(layer.add_cross(hidden, context))
            recorder.hidden(name, hidden)
        hidden = self.decoder_norm(hidden)
        recorder.hidden("language_model.decoder.last_hidden_state", hidden)
        return hidden

    def _causal_bias(self, positions: Tensor, kv_len: int) -> Tensor:
        """Return the bias of the decoder's self-attention, -inf for later positions.

        The caller slices the last axis to `kv_len`, after adding axes: an axis that is added after the slice
        has the slice's length as its stride, which loses the alignment.

        Args:
            positions: int64[N], of the queries.
            kv_len: number of positions to attend to.

        Returns:
            float[H, N, L], where L is `kv_len` rounded up to a multiple of `ALIGNMENT`.
        """
        relative = aligned_arange(kv_len, positions.device) - positions[:, None]
        return self.decoder_bias(relative).masked_fill(relative > 0, float("-inf")).contiguous()

    def _logits(self, hidden: Tensor) -> Tensor:
        """Apply the head. Checkpoints with tied heads were trained with `scale_decoder_outputs`."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return self.lm_head(hidden)
