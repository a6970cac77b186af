"""Requests of low priority use what others leave free, counted in steps of a scheduler without a model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from blip2_actor.engine.encode_stage import COMPANY_S, GATHER_S
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.out_of_memory import OutOfMemory
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.scheduler import Scheduler
from tests.unit.engine.scheduling.no_model import NoModel, make_image, make_request

MAX_SLOTS, ENCODE_BATCH = 32, 16
MEAN_TOKENS = 20
NUM_STEPS = 250
STEP_S = GATHER_S / 2


def make_scheduler(max_slots: int = MAX_SLOTS) -> Scheduler:
    return Scheduler(NoModel(), max_slots, ENCODE_BATCH)  # type: ignore[arg-type]  # a stand-in


class Load:
    """Online requests that arrive at random, and a batch job that always has requests waiting."""

    def __init__(self, online_share: float, has_batch: bool) -> None:
        self.scheduler = make_scheduler()
        self._now_s = 0.0
        self.scheduler.encoding.clock_s = lambda: self._now_s
        self.online_steps: list[int] = []
        """Steps from arrival to result of each online request."""
        self.num_batch_tokens = 0
        self._choose = random.Random(0)
        self._per_step = online_share * MAX_SLOTS / MEAN_TOKENS
        self._has_batch = has_batch
        self._online: list[tuple[RequestState, int]] = []
        self._batch: list[RequestState] = []

    def run(self) -> None:
        for step in range(NUM_STEPS):
            for _ in range(int(self._per_step) + (self._choose.random() < self._per_step % 1)):
                self._online.append((make_request(self._length(), arrived_s=self._now_s), step))
                self.scheduler.add(self._online[-1][0])
            while self._has_batch and len(self._batch) < 3 * MAX_SLOTS:
                self._batch.append(make_request(self._length(), low_priority=True))
                self.scheduler.add(self._batch[-1])
            self.scheduler.step()
            self._now_s += STEP_S
            self.online_steps += [step - start for request, start in self._online if request.future.done()]
            self._online = [one for one in self._online if not one[0].future.done()]
            done = [request for request in self._batch if request.future.done()]
            self.num_batch_tokens += sum(len(request.future.result(0).token_ids) for request in done)
            self._batch = [request for request in self._batch if not request.future.done()]

    def _length(self) -> int:
        return self._choose.randint(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2)


def test_online_requests_hardly_notice_a_batch_job_which_keeps_most_of_its_speed() -> None:
    """The online load is 30 %; without priorities, online requests waited for the job's whole queue."""
    online_alone, batch_alone = Load(0.3, has_batch=False), Load(0.0, has_batch=True)
    both = Load(0.3, has_batch=True)
    for load in (online_alone, batch_alone, both):
        load.run()
    assert len(both.online_steps) > 100
    assert np.mean(both.online_steps) <= 1.1 * np.mean(online_alone.online_steps)
    assert np.percentile(both.online_steps, 99) <= 1.1 * np.percentile(online_alone.online_steps, 99)
    assert both.num_batch_tokens >= 0.7 * batch_alone.num_batch_tokens


@pytest.mark.parametrize("low_priority", [True, False])
def test_next_to_texts_that_run_online_requests_share_passes_of_the_encoders(low_priority: bool) -> None:
    """One pass per arrival, and the prefill after it, used to take most of the device from the texts."""
    scheduler, now_s = make_scheduler(), [0.0]
    scheduler.encoding.clock_s = lambda: now_s[0]
    for _ in range(MAX_SLOTS // 2):
        scheduler.add(make_request(60, low_priority))
    scheduler.add(make_request(10, arrived_s=now_s[0]))
    for _ in range(5):
        scheduler.step()
    before = scheduler.encoding.num_calls
    calls_after_step = []
    for _ in range(8):
        scheduler.add(make_request(10, arrived_s=now_s[0]))
        scheduler.step()
        calls_after_step.append(scheduler.encoding.num_calls - before)
        now_s[0] += GATHER_S / 3
    assert calls_after_step == [0, 0, 0, 1, 1, 1, 1, 2]
    assert scheduler.encoding.num_images == MAX_SLOTS // 2 + 9


def test_images_of_a_caller_who_sends_one_after_the_other_do_not_wait() -> None:
    """Next to long texts, each would have waited for others in vain."""
    scheduler, now_s = make_scheduler(), [0.0]
    scheduler.encoding.clock_s = lambda: now_s[0]
    scheduler.add(make_request(60, arrived_s=now_s[0]))
    scheduler.step()
    for count in range(2, 6):
        now_s[0] += COMPANY_S + 0.001
        scheduler.add(make_request(10, arrived_s=now_s[0]))
        scheduler.step()
        assert scheduler.encoding.num_images == count
    now_s[0] += COMPANY_S - 0.001
    scheduler.add(make_request(10, arrived_s=now_s[0]))
    scheduler.step()
    assert scheduler.encoding.num_images == 5, "another may come as soon"


def test_an_image_that_has_waited_for_a_pass_does_not_wait_for_others() -> None:
    """The rest of a job's rows used to come only with the others."""
    scheduler, now_s = make_scheduler(), [0.0]
    scheduler.encoding.clock_s = lambda: now_s[0]
    for _ in range(ENCODE_BATCH + 3):
        scheduler.add(make_request(10))
    scheduler.step()
    scheduler.step()
    assert scheduler.encoding.num_images == ENCODE_BATCH, "the others might have company soon"
    now_s[0] += GATHER_S
    scheduler.step()
    assert scheduler.encoding.num_images == ENCODE_BATCH + 3


def test_a_full_batch_and_a_request_without_texts_next_to_it_wait_for_nobody() -> None:
    scheduler = make_scheduler()
    scheduler.encoding.clock_s = lambda: 0.0
    for count in (1, ENCODE_BATCH):
        before = scheduler.encoding.num_images
        for _ in range(count):
            scheduler.add(make_request(10))
        scheduler.step()
        assert scheduler.encoding.num_images == before + count


@pytest.mark.parametrize("num_texts", [1, 3])
def test_a_low_priority_text_gives_its_slot_up_and_begins_again(num_texts: int) -> None:
    scheduler = make_scheduler(max_slots=6)
    low = [make_request(20, low_priority=True, num_texts=num_texts) for _ in range(6 // num_texts)]
    for request in low:
        scheduler.add(request)
    for _ in range(5):
        scheduler.step()
    online = make_request(3)
    scheduler.add(online)
    for _ in range(3):
        scheduler.step()
    assert online.future.done(), "it got a slot at once"
    assert scheduler.counters.num_preempted == 1
    (oldest, *_) = low[0].searches[0].sequences()
    assert len(oldest.token_ids) == 9, "the youngest text gave its slot up, not the oldest"
    while scheduler.has_work:
        scheduler.step()
    lengths = [len(one.token_ids) for request in low for one in request.future.result(0).completions]
    assert lengths == [20] * 6


def test_a_request_that_does_not_fit_yet_preempts_nobody_in_vain() -> None:
    """Its eight slots would not become free anyway while another online request holds four of them."""
    scheduler = make_scheduler(max_slots=8)
    scheduler.add(make_request(50, num_texts=4))
    for _ in range(4):
        scheduler.add(make_request(50, low_priority=True))
    scheduler.step()
    scheduler.add(make_request(2, num_texts=8))
    for _ in range(10):
        scheduler.step()
    assert scheduler.counters.num_preempted == 0


def test_an_image_that_both_priorities_want_is_encoded_once() -> None:
    scheduler = make_scheduler()
    shared = make_image()
    requests = [make_request(2, low_priority=low, image=shared) for low in (True, False, True)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    assert all(request.future.result(0).ok for request in requests)
    assert scheduler.encoding.num_images == 1


def test_a_batch_of_both_priorities_that_does_not_fit_goes_back_to_both_lanes() -> None:
    scheduler = make_scheduler()
    for low_priority in (False, True, True):
        scheduler.add(make_request(2, low_priority))
    lanes = scheduler.lanes
    images = lanes.normal.waiting.take(4) + lanes.low.waiting.take(4)
    scheduler.encoding.finish(images, OutOfMemory("too much"))
    assert (len(lanes.normal.waiting), len(lanes.low.waiting)) == (1, 2)


def test_the_request_that_does_not_fit_alone_fails_and_no_other() -> None:
    """A waiting request of normal priority is first in line, but is not the one to blame."""
    scheduler = make_scheduler(max_slots=1)
    low = make_request(2, low_priority=True)
    normal = make_request(2)
    for request in (low, normal):
        request.image.prefix = torch.zeros(1, 1)
    scheduler.add(low)
    taken = scheduler.lanes.low.ready.take(1, 1)
    scheduler._place(taken[0])
    scheduler.add(normal)
    scheduler._recovery.after_prefill(taken, OutOfMemory("too much"))
    assert low.future.result(0).error == "out of memory: too much"
    assert not normal.future.done()


def test_an_image_of_both_priorities_survives_passes_that_fail_and_callers_who_leave() -> None:
    """Put back where it was queued already, it stood twice in a queue, and the engine failed. Put back for
    one priority alone, it was gone with that caller, and the request of the other waited for ever."""
    choose = random.Random(0)
    scheduler = make_scheduler()
    encoding, lanes = scheduler.encoding, scheduler.lanes
    images = [make_image() for _ in range(4)]
    requests: list[RequestState] = []
    passes: list[list[EncodedImage]] = []
    for _ in range(4000):
        action = choose.randrange(4)
        if action == 0:
            image = choose.choice(images)
            image.prefix = image.image_embeds = None
            image.keeps_image_embeds = choose.random() < 0.3
            requests.append(RequestState(image, low_priority=choose.random() < 0.5))
            scheduler.add(requests[-1])
        elif action == 1:
            lane = choose.choice(list(lanes))
            passes.append(encoding._next_images(lane, choose.randint(1, 3)))
        elif action == 2 and passes:
            taken = passes.pop(choose.randrange(len(passes)))
            if choose.random() < 0.5:
                encoding.finish(taken, OutOfMemory("not enough"))
                scheduler.limits.encode_batch = ENCODE_BATCH  # a size of 1 would fail requests
            else:
                NoModel().encode(taken)
                encoding.finish(taken, None)
        elif action == 3 and requests:
            choose.choice(requests).future.cancel()
        in_passes = {image for taken in passes for image in taken}
        for lane in lanes:
            queued = list(lane.waiting._images)
            assert len(queued) == len(lane.waiting) == len(set(queued))
            assert set(queued) <= lane.waiting._requests.keys() <= {*queued, *in_passes}
    for image in images:
        image.keeps_image_embeds = False
    for taken in passes:
        encoding.finish(taken, OutOfMemory("not enough"))
    while scheduler.has_work:
        scheduler.step()
    assert all(request.future.done() for request in requests)


def test_an_image_that_does_not_fit_alone_fails_the_requests_of_both_priorities() -> None:
    scheduler = Scheduler(NoModel(), 1, 1)  # type: ignore[arg-type]  # a stand-in
    image = make_image()
    requests = [make_request(1, low_priority=low, image=image) for low in (False, True)]
    for request in requests:
        scheduler.add(request)
    scheduler.encoding.finish(scheduler.lanes.low.waiting.take(1), OutOfMemory("not even one"))
    assert [request.future.result(0).error for request in requests] == ["out of memory: not even one"] * 2
    assert not scheduler.has_work
