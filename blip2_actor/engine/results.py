"""What callers get back: numbers in memory of their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import NOT_FINITE
from blip2_actor.models.recorder import Recorder
from blip2_actor.request import Features, Score, TextFeatures
from blip2_actor.status import Status
from blip2_actor.transfer import to_numpy


def to_features(image: EncodedImage, with_image_embeds: bool, recorder: Recorder) -> Features:
    """Return what the encoders have computed of an image, and what was recorded of it."""
    assert image.qformer_features is not None and image.pooler_output is not None, "the image is encoded"
    qformer_features, pooler_output = to_numpy(image.qformer_features), to_numpy(image.pooler_output)
    if not (np.isfinite(qformer_features).all() and np.isfinite(pooler_output).all()):
        return Features(status=Status.FAILED, error=NOT_FINITE)
    image_embeds = image.image_embeds if with_image_embeds else None
    return Features(
        qformer_features=qformer_features,
        pooler_output=pooler_output,
        image_embeds=None if image_embeds is None else to_numpy(image_embeds),
        **_recorded(recorder),
    )


def to_text_features(features: Tensor, recorder: Recorder) -> TextFeatures:
    """Return the hidden states of a text, and what was recorded of it."""
    array = to_numpy(features)
    if not np.isfinite(array).all():
        return TextFeatures(status=Status.FAILED, error=NOT_FINITE)
    return TextFeatures(features=array, **_recorded(recorder))


def to_score(logprobs: list[float], recorder: Recorder) -> Score:
    """Return the score of a text, from the log-probabilities of its tokens, and what was recorded of it."""
    total = sum(logprobs)
    if not math.isfinite(total):
        return Score(status=Status.FAILED, error=NOT_FINITE)
    return Score(logprob=total, num_tokens=len(logprobs), **_recorded(recorder))


def _recorded(recorder: Recorder) -> dict[str, Any]:
    """Return what was asked for, by the names of the fields; what nobody asked for stays None."""
    return {
        "hidden_states": recorder.hidden_states or None,
        "attention_maps": recorder.attention_maps or None,
    }
