"""The order of admission: small work first, callers in turn; nothing is lost when a caller leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from deploy.guard.fair_gate import FairGate

SMALL, LARGE = 10, 1000


class Line:
    """Requests at a gate, and the order in which they were let in."""

    def __init__(self, gate: FairGate) -> None:
        self.gate = gate
        self.let_in: list[str] = []
        self._leave: dict[str, Callable[[], None]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, work: int, *, units: int = 1, caller: str = "a") -> None:
        async def enter() -> None:
            self._leave[name] = await self.gate.enter(units, work, caller)
            self.let_in.append(name)

        self._tasks[name] = asyncio.create_task(enter())
        await settle()

    async def leave(self, name: str) -> None:
        self._leave.pop(name)()
        await settle()

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()

    async def leave_one_after_the_other(self) -> list[str]:
        """Make all requests leave in the order in which they came in; return the order."""
        for name in self.let_in:  # it grows
            if name in self._leave:
                await self.leave(name)
        return self.let_in


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_large_work_leaves_units_to_small_work() -> None:
    line = Line(FairGate(4, small_work=SMALL, kept_for_small=2))
    for name in ("large 1", "large 2", "large 3"):
        await line.ask(name, LARGE)
    for name in ("small 1", "small 2", "small 3"):
        await line.ask(name, SMALL)
    assert line.let_in == ["large 1", "large 2", "small 1", "small 2"]
    await line.leave("large 1")
    await line.leave("small 1")
    assert line.let_in[4:] == ["small 3", "large 3"]


async def test_a_small_request_does_not_wait_behind_the_large_ones_of_its_own_caller() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    for n in range(5):
        await line.ask(f"large {n}", LARGE)
    await line.ask("small", SMALL)
    assert (await line.leave_one_after_the_other())[:2] == ["large 0", "small"]


async def test_callers_take_turns() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    for n in range(4):
        await line.ask(f"greedy {n}", LARGE, caller="greedy")
    for n in range(2):
        await line.ask(f"modest {n}", LARGE, caller="modest")
    order = await line.leave_one_after_the_other()
    assert order.index("modest 0") <= 2 and order.index("modest 1") <= 4
    assert [name for name in order if "greedy" in name] == [f"greedy {n}" for n in range(4)]


async def test_large_work_is_not_starved_by_small_work() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    await line.ask("first", SMALL)
    await line.ask("large", LARGE, caller="b")
    for n in range(2 * LARGE // SMALL):
        await line.ask(f"small {n}", SMALL)
    order = await line.leave_one_after_the_other()
    assert order.index("large") < len(order) - 50


async def test_large_work_of_several_units_is_not_starved_by_small_work() -> None:
    """Each freed unit used to go to a small request, so that several were never free at once."""
    line = Line(FairGate(8, small_work=SMALL, kept_for_small=4))
    for n in range(8):
        await line.ask(f"first {n}", SMALL)
    await line.ask("large", LARGE, units=4, caller="b")
    for n in range(2 * LARGE // SMALL):
        await line.ask(f"small {n}", SMALL)
    order = await line.leave_one_after_the_other()
    assert LARGE // SMALL - 20 < order.index("large") < len(order) - 50


@pytest.mark.parametrize("seed", range(5))
async def test_small_work_waits_only_while_it_has_what_is_kept_for_it(seed: int) -> None:
    """Large requests of all sizes keep coming, and small ones leave and come one by one."""
    chosen, gate = random.Random(seed), FairGate(16, small_work=SMALL, kept_for_small=8)
    line = Line(gate)
    for n in range(400):
        if chosen.random() < 0.5:
            await line.ask(f"small {n}", SMALL, caller=chosen.choice("ab"))
        else:
            work = chosen.choice((2 * SMALL, 5 * SMALL))
            await line.ask(f"large {n}", work, units=chosen.randint(1, 8), caller=chosen.choice("abc"))
        while line._leave and chosen.random() < 0.5:
            await line.leave(chosen.choice([*line._leave]))
        num_small = sum(name.startswith("small") for name in line._leave)
        is_waiting = any(waiting.is_small for waiting in gate._waiting)
        assert num_small >= 8 or not is_waiting
    while line._leave:
        await line.leave(next(iter(line._leave)))
    assert len(line.let_in) == 400


async def test_more_units_than_there_are_count_as_all_and_run_alone() -> None:
    line = Line(FairGate(4, small_work=SMALL))
    await line.ask("huge", LARGE, units=100)
    await line.ask("next", LARGE)
    assert line.let_in == ["huge"]
    await line.leave("huge")
    assert line.let_in == ["huge", "next"]


async def test_who_gives_up_in_line_holds_nothing() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    await line.ask("first", SMALL)
    await line.ask("second", SMALL)
    await line.ask("third", SMALL)
    await line.give_up("second")
    await line.leave("first")
    assert line.let_in == ["first", "third"]


async def test_a_caller_does_not_wait_for_what_it_has_given_up() -> None:
    """A caller whose requests reached their time limit used to be behind all others from then on."""
    line = Line(FairGate(1, small_work=SMALL))
    await line.ask("running", LARGE, caller="modest")
    for n in range(20):
        await line.ask(f"given up {n}", LARGE, caller="impatient")
    for n in range(20):
        await line.give_up(f"given up {n}")
        if n == 10:
            await line.ask("waiting", LARGE, caller="modest")
    await line.ask("again", LARGE, caller="impatient")
    for n in range(9):
        await line.ask(f"modest {n}", LARGE, caller="modest")
    order = await line.leave_one_after_the_other()
    assert order.index("again") <= 2


async def test_giving_up_keeps_the_order_of_a_callers_requests() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    await line.ask("running", LARGE, caller="a")
    for n in range(5):
        await line.ask(f"given up {n}", LARGE, caller="a")
    await line.ask("patient", LARGE, caller="a")
    for n in range(5):
        await line.give_up(f"given up {n}")
    for n in range(5):
        await line.ask(f"later {n}", LARGE, caller="a")
    order = await line.leave_one_after_the_other()
    assert order[1:] == ["patient", *(f"later {n}" for n in range(5))]


async def test_a_request_that_gives_up_lets_those_behind_it_in() -> None:
    line = Line(FairGate(3, small_work=SMALL, kept_for_small=2))
    await line.ask("running", SMALL, units=2)
    await line.ask("too many units for now", SMALL, units=2)
    await line.ask("behind", SMALL, units=1)
    assert line.let_in == ["running"]
    await line.give_up("too many units for now")
    assert line.let_in == ["running", "behind"]


async def test_those_who_give_up_at_the_same_time_are_not_let_in() -> None:
    line = Line(FairGate(1, small_work=SMALL))
    for name in ("first", "second", "third", "fourth"):
        await line.ask(name, SMALL)
    line._leave.pop("first")()  # lets in the second, whose task has not run yet
    line._tasks["second"].cancel()
    await line.give_up("third")
    assert line.let_in == ["first", "fourth"]
    assert all(line._tasks[name].cancelled() for name in ("second", "third"))


async def test_who_gives_up_while_being_let_in_holds_nothing() -> None:
    gate = FairGate(1, small_work=SMALL)
    leave = await gate.enter(1, SMALL, "a")
    waiting = asyncio.create_task(gate.enter(1, SMALL, "b"))
    await settle()
    leave()  # lets the other in, whose task has not run yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(1):
        await gate.enter(1, SMALL, "c")


async def test_the_wait_is_known_from_the_work_ahead_and_the_speed_so_far() -> None:
    gate = FairGate(1, small_work=SMALL)
    assert gate.wait_s() == 0
    leave = await gate.enter(1, 100, "a")
    waiting = asyncio.create_task(gate.enter(1, 1000, "a"))
    await settle()
    assert gate.wait_s() is None
    await asyncio.sleep(0.05)
    leave()
    await waiting
    await_third = asyncio.create_task(gate.enter(1, 1000, "a"))
    await settle()
    wait_s = gate.wait_s()
    assert wait_s is not None and 0.3 < wait_s < 60  # 1000 at 100 in at least 0.05 s
    await_third.cancel()
