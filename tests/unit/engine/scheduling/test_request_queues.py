"""The queues in front of the slots count what they hold."""

from __future__ import annotations

import random

from blip2_actor.engine.out_of_memory import Limits
from blip2_actor.engine.request_queues import ReadyQueue
from tests.unit.engine.scheduling.no_model import make_request


def test_the_number_of_wanted_slots_follows_every_change() -> None:
    choose = random.Random(0)
    limits = Limits(max_slots=16, encode_batch=4)
    ready = ReadyQueue(limits)
    for step in range(400):
        action = choose.randrange(4)
        if action < 2:
            ready.add(make_request(2, num_texts=choose.randint(1, 16)))  # some need too many slots, and fail
        elif action == 2:
            taken = ready.take(choose.randint(0, 16), choose.randint(1, 3))
            for request in taken[1:]:
                request.future.cancel()  # a later `take` drops it
            ready.put_back([request for request in taken if choose.random() < 0.7])
        elif step % 100 == 99:
            limits.halve_slots()
            ready.check_again()
        assert ready.num_slots == sum(request.num_slots for request in ready._requests)
    while len(ready):
        ready.take_first()
    assert ready.num_slots == 0


def test_a_request_that_needs_more_slots_than_there_are_fails_and_does_not_wait_forever() -> None:
    ready = ReadyQueue(Limits(max_slots=4, encode_batch=4))
    fits, exceeds = make_request(2, num_texts=4), make_request(2, num_texts=5)
    ready.add(fits)
    ready.add(exceeds)
    assert ready.take(4, 2) == [fits] and not fits.future.done()
    assert "must be at most 4, got 5" in str(exceeds.future.result(0).error)
