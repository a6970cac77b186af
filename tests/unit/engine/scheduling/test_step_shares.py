"""A text of many slots does not slow the steps of the others, keeps its share, and changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from blip2_actor import GenerationOptions, Request
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.engine.step_shares import StepShares
from blip2_actor.testing import random_images, save_tiny_checkpoint
from tests.engines import cpu_config
from tests.unit.engine.scheduling.no_model import NoModel, make_request

NUM_TOKENS = 10
LONG = 10_000


class Device(NoModel):
    """A device with a clock: a step takes a second, plus some time per row."""

    def __init__(self, seconds_per_row: float) -> None:
        self.now_s = 0.0
        self.num_costly_steps = 0
        self._seconds_per_row = seconds_per_row

    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        self.now_s += 1 + self._seconds_per_row * len(token_ids)
        self.num_costly_steps += len(token_ids) >= 16
        return super().decode(token_ids, lengths)


def run(device: Device, *, has_costly: bool, shares_steps: bool = True) -> tuple[float, int]:
    """Return the seconds and the number of steps that 20 successive captions take."""
    scheduler = Scheduler(device, 32, 4, shares_steps=shares_steps)  # type: ignore[arg-type]  # a stand-in
    scheduler._shares = StepShares(lambda: device.now_s)
    if has_costly:
        scheduler.add(make_request(LONG, num_texts=16))
        scheduler.step()
    began_s, began_at, device.num_costly_steps = device.now_s, scheduler.counters.num_decode_steps, 0
    for _ in range(20):
        caption = make_request(NUM_TOKENS)
        scheduler.add(caption)
        while not caption.future.done():
            scheduler.step()
    return device.now_s - began_s, scheduler.counters.num_decode_steps - began_at


def test_where_steps_cost_by_rows_captions_take_at_most_twice_their_time() -> None:
    alone_s, _ = run(Device(1.0), has_costly=False)
    device = Device(1.0)
    seconds, _ = run(device, has_costly=True)
    assert seconds < 2.1 * alone_s
    assert device.num_costly_steps > 15, "texts of many slots must go on, with half of the time"
    unshared_s, _ = run(Device(1.0), has_costly=True, shares_steps=False)
    assert unshared_s > 5 * alone_s


def test_where_rows_cost_nothing_nobody_sits_out() -> None:
    device = Device(0.0)
    _, num_steps = run(device, has_costly=True)
    assert device.num_costly_steps >= num_steps - 2


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_tokens_are_those_of_a_text_alone(language: str, tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path, language))
    images = [image.numpy() for image in random_images(8)]
    wide = [
        GenerationOptions(num_beams=8, max_new_tokens=40, min_new_tokens=30),
        GenerationOptions(num_return_sequences=7, do_sample=True, seed=1, max_new_tokens=30),
    ]
    narrow = [GenerationOptions(max_new_tokens=length, num_beams=1 + length % 2) for length in range(3, 9)]
    requests = [
        Request(image=image, options=options) for image, options in zip(images, [*wide, *narrow], strict=True)
    ]
    config = cpu_config(folder, max_slots=20, skip_self_test=True)
    with config.build() as engine:
        alone = [engine.generate([request])[0] for request in requests]
        together = engine.generate([requests[0], *requests[2:5], requests[1], *requests[5:]])
        again = [together[0], together[4], *together[1:4], *together[5:]]
    assert [[c.token_ids for c in one.completions] for one in again] == [
        [c.token_ids for c in one.completions] for one in alone
    ]
