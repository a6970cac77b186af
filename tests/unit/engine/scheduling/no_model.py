"""A runner without a model, for tests of the scheduler alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import RequestState


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
