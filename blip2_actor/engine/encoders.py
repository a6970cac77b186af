"""The vision encoder, the Q-Former and the projection in one pass, compiled where that is asked for."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from blip2_actor.models.blip2 import Blip2

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """What one pass makes of a batch of images."""

    image_embeds: Tensor
    """float[B, P, Dv]."""
    pooler_output: Tensor
    """float[B, Dv]."""
    qformer_features: Tensor
    """float[B, Q, Dq]."""
    prefixes: Tensor
    """float[B, Q, Dw]."""


class Encoders:
    """One model's encoders. Only full batches are compiled: one shape is one minute of compiling, and to
    fill a batch up would make a single image wait for a whole one."""

    def __init__(self, model: Blip2, compiled_batch: int | None) -> None:
        """
        Args:
            compiled_batch: compile for batches of exactly this size, at the first of them; None never does.
        """
        self.compiled_batch = compiled_batch
        self._model = model
        self._compiled = self._run
        if compiled_batch is not None:
            self._compiled = torch.compile(self._run, dynamic=False, fullgraph=True)

    def __call__(self, images: Tensor) -> Encoded:
        """uint8[B, S, S, 3] -> what `Encoded` lists."""
        if len(images) != self.compiled_batch:
            return Encoded(*self._run(images))
        try:
            return Encoded(*self._compiled(images))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver that is missing or too old: of any class
            logger.warning("The encoders run uncompiled, they could not be compiled: %r", error)
            self.compiled_batch = None
            return self(images)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self._model
        image_embeds = model.image_features(model.normalizer(images, model.dtype))
        features = model.qformer_features(image_embeds)
        return image_embeds, model.vision.pool(image_embeds), features, model.project(features)
