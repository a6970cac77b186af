"""The scheduler alone: nobody waits for ever, and nothing is made smaller twice for one reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip2_actor import GenerationOptions
from blip2_actor.engine.out_of_memory import OutOfMemory
from blip2_actor.engine.request_state import EncodedImage, RequestState, Searches
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.generation.search import TextSearch

OPTIONS = GenerationOptions(max_new_tokens=2)


class Words:
    end_ids = frozenset({0})

    def decode(self, token_ids: Sequence[int]) -> str:
        return "word " * len(token_ids)


class NoModel:
    """A runner whose texts never end by themselves."""

    def cached_length(self, job: RequestState) -> int:
        return 1

    def encode(self, images: Sequence[EncodedImage]) -> None:
        for image in images:
            image.prefix = torch.zeros(1, 1)

    def prefill(self, jobs: Sequence[RequestState], slots: list[int]) -> Tensor:
        return self.decode(slots, slots)

    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(token_ids), 2).clone()

    def send_ahead(self, waiting: object, count: int) -> None: ...

    def copy_slots(self, *_: object) -> None: ...


def make_job(image: EncodedImage) -> RequestState:
    def searches() -> Searches:
        return [TextSearch(OPTIONS, [1], Words())]

    return RequestState(image, [1], OPTIONS, searches)


def make_image() -> EncodedImage:
    return EncodedImage(np.zeros((2, 2, 3), np.uint8))


def test_a_part_of_a_batch_is_encoded_though_there_is_always_a_text_to_start() -> None:
    """Six callers that ask of one image again and again kept three other images waiting without end."""
    scheduler = Scheduler(NoModel(), max_slots=4, encode_batch=4)  # type: ignore[arg-type]
    shared = make_image()
    shared.prefix = torch.zeros(1, 1)
    others = [make_job(make_image()) for _ in range(3)]
    askers = [make_job(shared) for _ in range(6)]
    for job in (*askers, *others):
        scheduler.add(job)
    for _ in range(100):
        scheduler.step()
        for index, job in enumerate(askers):
            if job.future.done():
                askers[index] = make_job(shared)
                scheduler.add(askers[index])
    assert all(job.future.done() for job in others)


def test_a_shortage_of_passes_that_were_begun_together_counts_once() -> None:
    """Each halved the batch again, down to single images and half of the slots."""
    scheduler = Scheduler(NoModel(), max_slots=4, encode_batch=4)  # type: ignore[arg-type]
    passes = [[make_job(make_image()).image for _ in range(4)] for _ in range(3)]
    for images in passes:
        scheduler._encoded(images, OutOfMemory("no more than two"))
    assert (scheduler.encode_batch, scheduler.max_slots) == (2, 4)
    assert len(scheduler.waiting) == 12
