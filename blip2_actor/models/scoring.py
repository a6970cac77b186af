"""How probable given texts are behind an image: what `score` is made of.

Works on prefixes that are encoded already, so that a score shares the image's pass through the vision
encoder with whatever else is asked of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.models.blip2 import Blip2
from blip2_actor.transfer import ids_to_device


def text_logprobs(
    model: Blip2,
    prefixes: Sequence[Tensor],
    prompt_ids: Sequence[Sequence[int]],
    text_ids: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Log-probability of each token of given texts; minus the mean is the reference's loss of the row.

    Args:
        model: the captioning model.
        prefixes: float[Q, Dw] each, from `Blip2.project`; one per text, the same tensor may recur.
        prompt_ids: what stands between image and text, not scored.
        text_ids: what is scored, the end token included where it should be.

    Returns:
        float32[U_i] for each text of U_i tokens, on the host.
    """
    device = prefixes[0].device
    prompts, texts = ids_to_device(prompt_ids, device), ids_to_device(text_ids, device)
    inputs = [
        torch.cat([prefix, model.embed_tokens(ids)]) for prefix, ids in zip(prefixes, prompts, strict=True)
    ]
    logits = torch.cat(model.language_model.predict(inputs, texts))
    losses = F.cross_entropy(logits.float(), torch.cat(texts), reduction="none")
    return list((-losses).cpu().split([len(text) for text in texts]))
