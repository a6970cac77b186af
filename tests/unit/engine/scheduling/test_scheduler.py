"""The scheduler alone: no request waits forever, and no limit is halved twice for one reason."""

from __future__ import annotations

import torch

from blip2_actor.engine.out_of_memory import OutOfMemory
from blip2_actor.engine.scheduler import Scheduler
from tests.unit.engine.scheduling.no_model import NoModel, make_image, make_request


def make_scheduler() -> Scheduler:
    return Scheduler(NoModel(), max_slots=4, encode_batch=4)  # type: ignore[arg-type]  # a stand-in


def test_a_part_of_a_batch_is_encoded_even_if_a_text_is_always_ready() -> None:
    """Six callers that kept asking about one image used to keep three other images waiting forever."""
    scheduler = make_scheduler()
    shared = make_image()
    shared.prefix = torch.zeros(1, 1)
    others = [make_request(2, arrived_s=1) for _ in range(3)]
    repeated = [make_request(2, image=shared) for _ in range(6)]
    for request in (*repeated, *others):
        scheduler.add(request)
    for _ in range(100):
        scheduler.step()
        for index, request in enumerate(repeated):
            if request.future.done():
                repeated[index] = make_request(2, image=shared, arrived_s=2)
                scheduler.add(repeated[index])
    assert all(request.future.done() for request in others)


def test_batches_that_began_together_and_do_not_fit_halve_the_limit_once() -> None:
    """Each of them used to halve the batch again, down to single images and half of the slots."""
    scheduler = make_scheduler()
    for _ in range(12):
        scheduler.add(make_request(2))
    batches = [scheduler.lanes.normal.waiting.take(4) for _ in range(3)]
    for images in batches:
        scheduler.encoding.finish(images, OutOfMemory("no more than two"))
    assert (scheduler.limits.encode_batch, scheduler.limits.max_slots) == (2, 4)
    assert len(scheduler.lanes.normal.waiting) == 12


def test_an_image_that_nobody_wants_any_longer_is_not_encoded() -> None:
    scheduler = make_scheduler()
    requests = [make_request(2) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    requests[0].future.cancel()
    while scheduler.has_work:
        scheduler.step()
    assert scheduler.encoding.num_images == 1
    assert requests[1].future.result(0).ok
    scheduler.add(make_request(2, image=requests[0].image))  # wanted again, so it is queued again
    assert len(scheduler.lanes.normal.waiting) == 1
