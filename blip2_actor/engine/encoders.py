"""The vision encoder, the Q-Former and the projection in one pass, compiled on demand."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from blip2_actor.models.blip2 import Blip2

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """What one pass computes of a batch of images."""

    image_embeds: Tensor
    """float[B, P, Dv]."""
    pooler_output: Tensor
    """float[B, Dv]."""
    qformer_features: Tensor
    """float[B, Q, Dq]."""
    prefixes: Tensor
    """float[B, Q, Dw]."""


class Encoders:
    """The encoders of one model.

    Only full batches run compiled. Compiling takes a minute per shape, and padding a batch would make a
    single image as slow as a full batch.
    """

    def __init__(self, model: Blip2, compiled_batch: int | None) -> None:
        """
        Args:
            compiled_batch: compile for batches of exactly this size, when the first one comes; None never
                compiles.
        """
        self.compiled_batch = compiled_batch
        self._model = model
        self._compiled = _encode
        if compiled_batch is not None:
            self._compiled = torch.compile(_encode, dynamic=False, fullgraph=True)

    def __call__(self, images: Tensor) -> Encoded:
        """Encode uint8[B, S, S, 3]."""
        if len(images) != self.compiled_batch:
            return Encoded(*_encode(self._model, images))
        try:
            return Encoded(*self._compiled(self._model, images))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing or old compiler or driver raises errors of any class
            logger.warning("The encoders could not be compiled and run uncompiled: %r", error)
            self.compiled_batch = None
            return self(images)


def _encode(model: Blip2, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_embeds = model.image_features(model.normalizer(images, model.dtype))
    features = model.qformer_features(image_embeds)
    return image_embeds, model.vision.pool(image_embeds), features, model.project(features)
