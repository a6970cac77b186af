"""A runner without a model, and requests for it, to test the scheduler alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip2_actor import GenerationOptions
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import RequestState
from blip2_actor.generation.search import TextSearch


class Words:
    end_ids = frozenset({0})

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return "word " * len(token_ids)


class NoModel:
    """A runner whose texts end only at `max_new_tokens`."""

    def cached_length(self, request: RequestState) -> int:
        return 1

    def encode(self, images: Sequence[EncodedImage]) -> None:
        for image in images:
            image.prefix = torch.zeros(1, 1)

    def prefill(self, requests: Sequence[RequestState], slots: list[int]) -> Tensor:
        return self.decode(slots, slots)

    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(token_ids), 2).clone()

    def copy_slots(self, *_: object) -> None: ...

    def shrink(self, num_slots: int) -> None: ...

    def forget_images(self) -> None: ...


def make_image() -> EncodedImage:
    return EncodedImage(np.zeros((2, 2, 3), np.uint8))


def make_request(
    num_tokens: int,
    low_priority: bool = False,
    image: EncodedImage | None = None,
    num_texts: int = 1,
    arrived_s: float = 0.0,
) -> RequestState:
    """Make a request; by default, one whose image has waited long enough for others."""
    options = GenerationOptions(max_new_tokens=num_tokens).resolve()
    return RequestState(
        image or make_image(),
        [1],
        options,
        lambda: [TextSearch(options, [1], Words()) for _ in range(num_texts)],
        low_priority,
        arrived_s=arrived_s,
    )
