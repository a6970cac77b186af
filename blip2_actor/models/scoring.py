"""How probable given texts are as continuations of an image: the arithmetic of `Engine.score`.

It starts from encoded images, so that all requests for one image share its pass through the vision encoder.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.transfer import ids_to_device


def text_logprobs(
    model: Blip2,
    prefixes: Sequence[Tensor],
    prompt_ids: Sequence[Sequence[int]],
    text_ids: Sequence[Sequence[int]],
    recorder: Recorder = NO_RECORDER,
) -> list[Tensor]:
    """Compute the log-probability of each token of given texts.

    Minus the mean over a text is the reference's loss of that text.

    Args:
        model: the captioning model.
        prefixes: float[Q, Dw] each, from `Blip2.project`; one per text. The same tensor may occur several
            times.
        prompt_ids: ids between image and text, which are not scored.
        text_ids: ids that are scored, including the end token if it should count.
        recorder: takes the hidden states and the attentions of one text.

    Returns:
        float32[U_i] for each text of U_i tokens, on the host.
    """
    device = prefixes[0].device
    prompts, texts = ids_to_device(prompt_ids, device), ids_to_device(text_ids, device)
    embed = model.language_model.embed_tokens
    inputs = [torch.cat([prefix, embed(ids)]) for prefix, ids in zip(prefixes, prompts, strict=True)]
    logits = torch.cat(model.language_model.predict(inputs, texts, recorder))
    losses = F.cross_entropy(logits.float(), torch.cat(texts), reduction="none")
    return list((-losses).cpu().split([len(text) for text in texts]))
