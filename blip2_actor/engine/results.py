"""What callers get back: a status for what was refused, or numbers in memory of their own."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.engine.request_state import NOT_FINITE
from blip2_actor.request import Features, Score, TextFeatures
from blip2_actor.status import Status
from blip2_actor.transfer import to_numpy


def to_features(
    image: EncodedImage | RequestRefused,
    with_image_embeds: bool,
    attention_maps: dict[str, np.ndarray] | None,
    hidden_states: dict[str, np.ndarray] | None,
) -> Features:
    """Return what the encoders have computed of an image."""
    if isinstance(image, RequestRefused):
        return Features(status=image.status, error=str(image))
    qformer_features, pooler_output = to_numpy(image.qformer_features), to_numpy(image.pooler_output)
    if not all(np.isfinite(x).all() for x in (qformer_features, pooler_output) if x is not None):
        return Features(status=Status.FAILED, error=NOT_FINITE)
    return Features(
        qformer_features=qformer_features,
        pooler_output=pooler_output,
        image_embeds=to_numpy(image.image_embeds) if with_image_embeds else None,
        attention_maps=attention_maps,
        hidden_states=hidden_states,
    )


def to_text_features(features: Tensor | RequestRefused) -> TextFeatures:
    """Return the hidden states of a text."""
    if isinstance(features, RequestRefused):
        return TextFeatures(status=features.status, error=str(features))
    return TextFeatures(features=to_numpy(features))


def to_score(logprobs: list[float] | RequestRefused) -> Score:
    """Return the score of a text, from the log-probabilities of its tokens."""
    if isinstance(logprobs, RequestRefused):
        return Score(status=logprobs.status, error=str(logprobs))
    total = sum(logprobs)
    if not math.isfinite(total):
        return Score(status=Status.FAILED, error=NOT_FINITE)
    return Score(logprob=total, num_tokens=len(logprobs))
