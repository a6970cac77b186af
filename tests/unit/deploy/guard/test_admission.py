"""What a request costs, what a gateway refuses, and when a retry can help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blip2_actor import GenerationOptions
from deploy.guard.admission import Admission
from deploy.guard.callers import CALLER, Caller
from deploy.guard.cost import Cost, cost_of
from deploy.http.errors import ApiError
from deploy.work import ImageWork, TextToGenerate, TextToScore

CAPTION = Cost(slots=1, steps=30)
HUGE = Cost(slots=16, steps=180)


def admission(*, slots: int = 8, max_in_flight: int = 100, timeout_s: float = 5.0) -> Admission:
    return Admission(slots=slots, max_in_flight=max_in_flight, timeout_s=timeout_s)


@asynccontextmanager
async def admit(door: Admission, cost: Cost) -> AsyncIterator[None]:
    """Do what a gateway does for most requests."""
    async with door.serve(cost), door.slots(cost):
        yield


async def hold(door: Admission, cost: Cost, release: asyncio.Event) -> None:
    async with admit(door, cost):
        await release.wait()


async def refusal(door: Admission, cost: Cost = CAPTION) -> ApiError:
    with pytest.raises(ApiError) as caught:
        async with admit(door, cost):
            await asyncio.Event().wait()
    return caught.value


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_at_the_limit_no_request_is_admitted_until_one_ends() -> None:
    door = admission(max_in_flight=1)
    async with admit(door, CAPTION):
        error = await refusal(door)
        assert (error.code, error.type, error.headers["Retry-After"]) == (503, "overloaded", "1")
    async with admit(door, CAPTION):
        pass


async def test_a_request_that_takes_too_long_is_504_and_is_no_longer_counted() -> None:
    door = admission(max_in_flight=1, timeout_s=0.02)
    for _ in range(2):
        error = await refusal(door)
        assert (error.code, error.type) == (504, "timeout")


async def test_a_caption_passes_two_dozen_huge_requests() -> None:
    door, release = admission(), asyncio.Event()
    holding = [asyncio.create_task(hold(door, HUGE, release)) for _ in range(24)]
    await settle()
    assert door.stats()["slots_held"] == 4, "half of the slots are for small work"
    async with asyncio.timeout(1), admit(door, CAPTION):
        pass
    release.set()
    await asyncio.gather(*holding)


async def test_a_key_at_its_quota_is_429_while_others_are_served() -> None:
    door, release = admission(), asyncio.Event()
    CALLER.set(Caller(name="alice", max_in_flight=2))
    holding = [asyncio.create_task(hold(door, CAPTION, release)) for _ in range(2)]
    await settle()
    error = await refusal(door)
    assert (error.code, error.type) == (429, "quota")
    assert int(error.headers["Retry-After"]) >= 1 and "alice" in error.message
    CALLER.set(Caller(name="bob", max_in_flight=2))
    async with admit(door, CAPTION):
        pass
    release.set()
    await asyncio.gather(*holding)


async def test_a_drain_refuses_what_comes_and_waits_for_what_runs() -> None:
    door, release = admission(), asyncio.Event()
    running = asyncio.create_task(hold(door, CAPTION, release))
    await settle()
    drained = asyncio.create_task(door.drain())
    await settle()
    error = await refusal(door)
    assert (error.code, error.type, error.headers["Retry-After"]) == (503, "unavailable", "1")
    with pytest.raises(ApiError):
        door.check_open()
    assert not drained.done()
    release.set()
    await asyncio.gather(running, drained)


async def test_retry_after_is_the_wait_that_is_to_be_expected() -> None:
    door, release = admission(slots=1, max_in_flight=3), asyncio.Event()
    async with admit(door, CAPTION):
        await asyncio.sleep(0.1)  # 30 steps in 0.1 s
    holding = [asyncio.create_task(hold(door, HUGE, release)) for _ in range(3)]
    await settle()
    error = await refusal(door)
    # Two requests of 2880 slot-steps wait.
    assert 10 <= int(error.headers["Retry-After"]) <= 60
    release.set()
    await asyncio.gather(*holding)


def texts(*options: dict[str, Any]) -> ImageWork:
    made = (GenerationOptions(**given).resolve() for given in options)
    return ImageWork(texts=tuple(TextToGenerate(prompt=None, options=one) for one in made))


def test_beams_samples_and_texts_are_slots() -> None:
    assert cost_of(texts({"max_new_tokens": 10})).slot_steps == 10
    assert cost_of(texts({"max_new_tokens": 180, "num_beams": 16})).slot_steps == 16 * 180
    sampled = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 4}
    assert cost_of(texts(sampled, {"max_new_tokens": 12, "num_beams": 3})) == Cost(slots=7, steps=12)


def test_scores_and_features_cost_a_step_per_image() -> None:
    for work in (ImageWork(scores=(TextToScore(text="a dog"),)), ImageWork(features=True), ImageWork()):
        assert cost_of(work, num_images=5) == Cost(slots=5, steps=1)


async def test_batch_work_neither_waits_for_others_nor_makes_them_wait() -> None:
    """Batch work has its own slots, twice the gateway's number, and more than that is refused at once."""
    door = admission(slots=8, max_in_flight=1)
    async with door.admit_batch(Cost(slots=10, steps=30)), door.admit_batch(Cost(slots=6, steps=30)):
        with pytest.raises(ApiError) as caught:
            async with door.admit_batch(CAPTION):
                pass
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (503, "1")
        async with admit(door, CAPTION):
            assert door.stats()["num_in_flight"] == 1 and door.stats()["num_waiting"] == 0
    async with door.admit_batch(Cost(slots=1000, steps=30)):
        assert door.stats()["batch_slots_held"] == 1000, "more than fits may go alone"
    assert door.stats()["batch_slots_held"] == 0


def test_a_key_needs_the_right_to_send_batch_work() -> None:
    async def run() -> ApiError:
        CALLER.set(Caller(name="alice", may_send_batches=False))
        with pytest.raises(ApiError) as caught:
            async with admission().admit_batch(CAPTION):
                pass
        return caught.value

    error = asyncio.run(run())
    assert (error.code, error.type) == (403, "no_batch_right")
    assert error.message.endswith("python -m deploy.guard.keys alice --batch")


async def test_batch_work_ends_with_the_service_or_after_its_time_and_does_not_hold_it_up() -> None:
    door = admission(timeout_s=0.05)
    async with door.admit_batch(CAPTION) as check:
        check()
        await asyncio.sleep(0.06)
        with pytest.raises(ApiError, match=r"not finished within 0\.05 s"):
            check()
        await asyncio.wait_for(door.drain(), 1)
        with pytest.raises(ApiError, match="the service is draining"):
            check()
        with pytest.raises(ApiError, match="the service is draining"):
            async with door.admit_batch(CAPTION):
                pass


async def test_batch_work_that_others_have_kept_waiting_is_not_said_to_be_too_long() -> None:
    """A job gives up a text that is too long, but must not give up one for which an endpoint had no room."""
    door = admission(slots=1, timeout_s=0.05)
    async with door.admit_batch(CAPTION) as check:
        await asyncio.sleep(0.06)
        async with admit(door, CAPTION):
            with pytest.raises(ApiError, match="other requests have the slots") as caught:
                check()
            assert (caught.value.code, caught.value.type) == (503, "unavailable")
        with pytest.raises(ApiError) as caught:
            check()
        assert (caught.value.code, caught.value.type) == (504, "timeout")
