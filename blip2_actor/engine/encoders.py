"""The vision encoder, the Q-Former and the projection in one pass, compiled or replayed on demand."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from blip2_actor.engine.cuda_graphs import Captures, Step, StepCapturer
from blip2_actor.engine.out_of_memory import is_out_of_memory
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

    Only full batches run compiled or replayed. Compiling takes a minute per shape, and padding a batch would
    make a single image as slow as a full batch.
    """

    def __init__(
        self, model: Blip2, full_batch: int = 0, compiles: bool = False, capturer: StepCapturer | None = None
    ) -> None:
        """
        Args:
            full_batch: images of a full batch.
            compiles: compile for full batches, when the first one comes.
            capturer: captures the pass of a full batch to replay it; None runs it kernel by kernel. The host
                takes longer to launch its 500 kernels than some GPUs to run them, if other threads compute.
        """
        self.compiled_batch = full_batch if compiles else None
        """Compile for batches of exactly this size."""
        self._model = model
        self._compiled = _encode
        if compiles:
            from torch.compiler import config

            # The key of torch's cache on disk lacks the CPU: code for AVX2 writes beyond tensors in AVX512.
            config.cache_key_tag = config.cache_key_tag or torch.backends.cpu.get_cpu_capability()
            self._compiled = torch.compile(_encode, dynamic=False, fullgraph=True)
        self._replay = EncodeReplay(model, full_batch, capturer) if capturer is not None else None

    def __call__(self, images: Tensor) -> Encoded:
        """Encode uint8[B, S, S, 3]."""
        if self._replay is not None and len(images) == self._replay.batch:
            return self._replay(images)
        if len(images) != self.compiled_batch:
            return Encoded(*_encode(self._model, images))
        try:
            return Encoded(*self._compiled(self._model, images))
        except Exception as error:  # a missing or old compiler or driver raises errors of any class
            if is_out_of_memory(error):
                raise
            logger.warning("The encoders could not be compiled and run uncompiled: %r", error)
            self.compiled_batch = None
            return self(images)

    def forget(self) -> None:
        """Give back the memory of what was captured."""
        if self._replay is not None:
            self._replay.forget()


class EncodeReplay:
    """Batches of one size, encoded by a captured pass, which reads and writes tensors that never move.

    The pass is captured when the second batch of this size comes.
    """

    def __init__(self, model: Blip2, batch: int, capturer: StepCapturer) -> None:
        self.batch = batch
        self._model = model
        self._captures = Captures(capturer)
        self._images: Tensor | None = None
        self._encoded: tuple[Tensor, ...] = ()
        self._pass: Step | None = None

    def __call__(self, images: Tensor) -> Encoded:
        """Encode uint8[batch, S, S, 3]; the result is the caller's."""
        if self._images is None:
            encoded = _encode(self._model, images)
            self._encoded = tuple(map(torch.empty_like, encoded))
            self._images = torch.empty_like(images)  # last: memory may not suffice for the others
            return Encoded(*encoded)
        self._images.copy_(images)
        if self._pass is None:
            self._pass = self._captures.capture(self._encode)
        self._pass()
        return Encoded(*(tensor.clone() for tensor in self._encoded))

    def forget(self) -> None:
        """Drop the pass and its tensors."""
        self._images, self._encoded, self._pass = None, (), None
        self._captures.forget()

    def _encode(self) -> None:
        assert self._images is not None
        for kept, new in zip(self._encoded, _encode(self._model, self._images), strict=True):
            kept.copy_(new)


def _encode(model: Blip2, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_embeds = model.image_features(model.normalizer(images, model.dtype))
    features = model.qformer_features(image_embeds)
    return image_embeds, model.vision.pool(image_embeds), features, model.project(features)
