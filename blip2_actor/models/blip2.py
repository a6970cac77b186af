"""The whole of BLIP-2: vision encoder, Q-Former, projection, language model (arXiv:2301.12597).

Axis letters, for every file of this package:

    B  images            S  side of the square image, px     P  image tokens (class token + patches)
    Q  queries           T  text tokens                      U  tokens of a given text (labels)
    R  running texts     L  positions in a slot              V  vocabulary
    H  heads             E  channels of one head             N  items of any other kind
    Dv vision width      Dq Q-Former width                   Dw width of the word embeddings
    D  width of the layer in question

Read the files in this order: `vision.py`, `qformer.py`, this file, then `opt.py` or `t5.py`. A running text
occupies one slot of a `KVCache` (`kv_cache.py`); `language_model.py` is the interface to the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Blip2Config

from blip2_actor.models.layers import Linear
from blip2_actor.models.opt import OptDecoder
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.models.t5 import T5
from blip2_actor.models.vision_qformer import VisionQFormer
from blip2_actor.transfer import ids_to_device

LANGUAGE_MODELS: dict[str, type[OptDecoder] | type[T5]] = {"opt": OptDecoder, "t5": T5}
"""Our classes by `model_type` of the text configuration."""


class Blip2(VisionQFormer):
    """The captioning model: an image and a prompt in, a text out."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.language_projection = Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = LANGUAGE_MODELS[config.text_config.model_type](config.text_config)

    def project(self, qformer_features: Tensor) -> Tensor:
        """Return the image as the language model reads it: float[B, Q, Dq] -> float[B, Q, Dw]."""
        return self.language_projection(qformer_features)

    def prefix_ids(self, prompt_ids: list[int]) -> list[int]:
        """Return the ids that the reference's logits processors see before the first new token.

        An image token that the language model does not know is left out: it has no logit to change.
        """
        image_token_id, vocab_size = self.config.image_token_index, self.config.text_config.vocab_size
        is_known = image_token_id is not None and 0 <= image_token_id < vocab_size
        image_ids = [image_token_id] * self.config.num_query_tokens if is_known else []
        return self.language_model.prefix_ids(image_ids + prompt_ids)

    def text_logprobs(
        self,
        prefixes: Sequence[Tensor],
        prompt_ids: Sequence[Sequence[int]],
        text_ids: Sequence[Sequence[int]],
        recorder: Recorder = NO_RECORDER,
    ) -> list[Tensor]:
        """Compute the log-probability of each token of given texts, as continuations of images.

        Minus the mean over a text is the reference's loss of that text.

        Args:
            prefixes: float[Q, Dw] each, from `project`; one per text. The same tensor may occur twice.
            prompt_ids: ids between image and text, which are not scored.
            text_ids: ids that are scored, including the end token if it should count.
            recorder: takes the hidden states and the attentions of one text.

        Returns:
            float32[U_i] for each text of U_i tokens, on the host.
        """
        device, embed = prefixes[0].device, self.language_model.embed_tokens
        prompts, texts = ids_to_device(prompt_ids, device), ids_to_device(text_ids, device)
        inputs = [torch.cat([prefix, embed(ids)]) for prefix, ids in zip(prefixes, prompts, strict=True)]
        logits = torch.cat(self.language_model.predict(inputs, texts, recorder))
        losses = F.cross_entropy(logits.float(), torch.cat(texts), reduction="none")
        return list((-losses).cpu().split([len(text) for text in texts]))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and the logits of given texts (teacher forcing).

        Args:
            pixel_values: float[B, 3, S, S], normalized.
            input_ids: int64[B, T], without image tokens: prompt and text for OPT, the prompt for T5.
            labels: int64[B, U], -100 for tokens that do not count in the loss. For OPT they are aligned
                with `input_ids` (U = T; the last query predicts the first token), for T5 they are the text.
                None takes `input_ids`.

        Returns:
            float[], the mean loss over the labels, and float[B, U, V], the logits that predict them.
        """
        labels = input_ids if labels is None else labels
        prefix = self.project(self.qformer_features(self.image_features(pixel_values)))
        logits = self.language_model(prefix, input_ids, labels)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100), logits
