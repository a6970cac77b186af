"""Steps queued before the tokens of the last one are read: their order, slots, and what is discarded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_actor import GenerationOptions
from blip2_actor.engine.request_state import RequestState, Searches
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.generation.search import TextSearch
from blip2_actor.generation.step import LateTokens
from tests.unit.engine.scheduling.no_model import NoModel, Words, make_image


class LateModel(NoModel):
    """A runner that records its calls; texts in the slots `ends` end at the next step."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ends: set[int] = set()

    def prefill(self, requests: Sequence[RequestState], slots: list[int]) -> Tensor:
        self.said.append(f"prefill {len(slots)}")
        return super().decode(slots, slots)

    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        self.said.append(f"decode {token_ids}")
        logits = super().decode(token_ids, lengths)
        for slot in self.ends:
            logits[slot] = logits[slot].flip(0)
        return logits

    def select(
        self,
        logits: Tensor,
        slots: Sequence[int],
        rows: Sequence[int],
        early: Sequence[int],
        end_ids: Collection[int],
    ) -> LateTokens:
        return NotedTokens(logits, self.said, early, end_ids)


class NotedTokens(LateTokens):
    def __init__(
        self, logits: Tensor, said: list[str], early: Sequence[int], end_ids: Collection[int]
    ) -> None:
        super().__init__(logits, early, end_ids)
        self._said = said

    def read(self) -> tuple[list[int], list[float]]:
        self._said.append("read")
        return super().read()


@pytest.fixture
def model() -> LateModel:
    return LateModel()


@pytest.fixture
def scheduler(model: LateModel) -> Scheduler:
    return Scheduler(model, max_slots=2, encode_batch=4, reads_late=True)  # type: ignore[arg-type]


def add(
    scheduler: Scheduler,
    *num_tokens: int,
    low_priority: bool = False,
    on_token: Callable[[Sequence[int]], None] | None = None,
    **options: Any,
) -> RequestState:
    """Add a request with a text for each of `num_tokens`."""
    asked = [GenerationOptions(max_new_tokens=number, **options).resolve() for number in num_tokens]

    def searches() -> Searches:
        return [TextSearch(of_text, [1], Words(), on_token=on_token) for of_text in asked]

    request = RequestState(make_image(), [1], asked[0], searches, low_priority, arrived_s=0.0)
    request.future.add_done_callback(scheduler.note_cancelled)
    scheduler.add(request)
    return request


def texts_of(request: RequestState) -> list[tuple[int, ...]]:
    assert request.future.done()
    return [completion.token_ids for completion in request.future.result().completions]


def text_of(request: RequestState) -> tuple[int, ...]:
    (token_ids,) = texts_of(request)
    return token_ids


def test_a_step_is_queued_before_the_tokens_of_the_last_one_are_read(scheduler, model) -> None:
    request = add(scheduler, 4)
    while scheduler.has_work:
        scheduler.step()
    step = "decode [-1]"
    assert model.said == ["prefill 1", step, "read", step, "read", step, "read", "read"]
    assert text_of(request) == (1, 1, 1, 1)
    assert (scheduler.counters.num_tokens, scheduler.counters.num_finished) == (4, 1)


def test_a_slot_of_a_text_that_may_have_no_more_tokens_is_free_at_once(scheduler, model) -> None:
    """The next text waits no longer than if the tokens had been read before."""
    requests = [add(scheduler, num_tokens) for num_tokens in (3, 3, 2, 2)]
    while scheduler.has_work:
        scheduler.step()
    first, second = ["prefill 2", "decode [-1, -1]", "read", "decode [-1, -1]", "read"], ["prefill 2"]
    second += ["decode [-1, -1]", "read", "read", "read"]
    assert model.said == first + second
    assert [len(text_of(request)) for request in requests] == [3, 3, 2, 2]
    assert scheduler.num_running == 0


def test_a_text_of_one_token_needs_no_step(scheduler, model) -> None:
    request = add(scheduler, 1)
    scheduler.step()
    assert model.said == ["prefill 1", "read"] and text_of(request) == (1,)
    assert not scheduler.has_work and scheduler.counters.num_decode_steps == 0


def test_what_is_made_after_the_end_of_a_text_is_thrown_away(scheduler, model) -> None:
    request = add(scheduler, 9)
    scheduler.step()
    model.ends = {0}
    scheduler.step()
    assert not request.future.done()
    scheduler.step()
    assert text_of(request) == (1, 1, 0)
    scheduler.step()
    assert not scheduler.has_work and scheduler.counters.num_tokens == 3
    assert scheduler.counters.num_decode_steps == 3


def test_texts_that_need_more_than_the_largest_logit_are_read_at_once(scheduler, model) -> None:
    request = add(scheduler, 3, repetition_penalty=1.5)
    while scheduler.has_work:
        scheduler.step()
    assert len(text_of(request)) == 3 and model.said[0] == "prefill 1"
    assert all(said.startswith("decode") and "-1" not in said for said in model.said[1:])


def test_steps_are_queued_ahead_while_the_end_is_banned(scheduler, model) -> None:
    """The largest logit is the end for three tokens; the device selects the largest of the others."""
    model.ends = {0}
    request = add(scheduler, 5, min_new_tokens=3)
    while scheduler.has_work:
        scheduler.step()
    assert text_of(request) == (1, 1, 1, 0)
    assert model.said[:4] == ["prefill 1", "decode [-1]", "read", "decode [-1]"]


@pytest.mark.parametrize("reads_late", [True, False])
def test_a_text_that_begins_again_keeps_the_tokens_that_its_caller_has_seen(model, reads_late: bool) -> None:
    """In another batch the device may round differently: here the second token would then end the text.

    A stream would stop in the middle of its text, without an error.
    """
    scheduler = Scheduler(model, max_slots=2, encode_batch=4, reads_late=reads_late)
    said: list[tuple[int, ...]] = []
    low = add(scheduler, 5, low_priority=True, on_token=lambda ids: said.append(tuple(ids)))
    while len(said) < 3:
        scheduler.step()
    model.ends = {0}
    for num_preempted in (1, 2):  # the second time before its tokens exist again
        add(scheduler, 1, 1)
        scheduler.step()
        scheduler.step()
        assert scheduler.counters.num_preempted == num_preempted
    while scheduler.has_work:
        scheduler.step()
    assert said == [(1,), (1, 1), (1, 1, 1), (1, 1, 1, 0)]
    assert text_of(low) == said[-1]
    assert low.future.result().completions[0].token_logprobs == pytest.approx([-0.3133] * 4, abs=1e-4)


def test_steps_are_queued_ahead_while_a_text_takes_its_tokens_again(scheduler, model) -> None:
    """Known tokens need no reading, and neighboring texts must not wait for it."""
    said: list[tuple[int, ...]] = []
    low = add(scheduler, 5, low_priority=True, on_token=lambda ids: said.append(tuple(ids)))
    while len(said) < 3:
        scheduler.step()
    add(scheduler, 1, 1)
    while scheduler.has_work:
        scheduler.step()
    assert scheduler.counters.num_preempted == 1 and len(text_of(low)) == 5
    again = model.said[len(model.said) - model.said[::-1].index("prefill 1") - 1 :]
    known, unknown = "decode [1]", "decode [-1]"
    assert again == ["prefill 1", known, "read", known, "read", known, "read", unknown, "read", "read"]


def test_a_text_that_has_ended_waits_for_the_others_of_its_request(scheduler, model) -> None:
    request = add(scheduler, 9, 4)
    scheduler.step()
    model.ends = {0}
    scheduler.step()
    model.ends = set()
    while scheduler.has_work:
        scheduler.step()
    assert texts_of(request) == [(1, 1, 0), (1, 1, 1, 1)]


def test_a_cancelled_text_leaves_its_slot_and_accepts_nothing(scheduler, model) -> None:
    cancelled, other = add(scheduler, 6), add(scheduler, 6)
    scheduler.step()
    known = cancelled.searches[0].tokens()
    cancelled.future.cancel()
    while scheduler.has_work:
        scheduler.step()
    assert cancelled.searches[0].tokens() == known and text_of(other) == (1,) * 6


def test_who_waits_for_a_text_that_is_cancelled_without_its_slot_is_told(scheduler, model) -> None:
    """Its last token is unread, and the table of slots has already dropped it."""
    request = add(scheduler, 2)
    scheduler.step()

    def select(logits: Tensor, *_: object) -> LateTokens:
        request.future.cancel()
        return LateTokens(logits)

    model.select = select
    others = [add(scheduler, 1) for _ in range(2)]
    while scheduler.has_work:
        scheduler.step()
    assert all(other.future.done() for other in others)
    assert not wait([request.future], timeout=0).not_done


@pytest.mark.parametrize("rows", [1, 3])
def test_late_tokens_are_the_largest_logits_and_their_log_probabilities(rows: int) -> None:
    logits = torch.randn(rows, 7)
    token_ids, logprobs = LateTokens(logits.clone()).read()
    assert token_ids == logits.argmax(1).tolist()
    assert logprobs == pytest.approx(logits.log_softmax(1).amax(1).tolist())


def test_early_rows_take_the_largest_logit_that_does_not_end_a_text() -> None:
    logits = torch.tensor([[9.0, 1, 2], [9, 1, 2], [0, 5, 2]])
    token_ids, logprobs = LateTokens(logits, early=[1, 2], end_ids={0}).read()
    assert token_ids == [0, 2, 1]
    assert logprobs == pytest.approx(logits.log_softmax(1)[range(3), token_ids].tolist())
    assert LateTokens(logits, early=[1, 2]).read()[0] == [0, 0, 1], "a vocabulary without an end"
