"""Each slot has one owner, and the used slots come first when a decode step begins."""

from __future__ import annotations

import random

import pytest

from blip2_actor import GenerationOptions
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.slot_table import RunningText, SlotTable
from blip2_actor.generation.beam_search import BeamSearch
from tests.unit.engine.scheduling.no_model import Words, make_image


def place(table: SlotTable, num_slots: int) -> RunningText:
    search = BeamSearch(GenerationOptions(num_beams=num_slots).resolve(), [1], Words())
    return table.place(RequestState(make_image(), make_searches=lambda: [search]), search, prefix_length=3)


def used(table: SlotTable) -> list[int]:
    return [slot for text in table.texts for slot in text.slots]


def test_the_lowest_free_slots_are_given_first() -> None:
    table = SlotTable(6)
    first, second = place(table, 2), place(table, 3)
    assert (first.slots, second.slots) == ([0, 1], [2, 3, 4])
    table.free([first])
    assert place(table, 3).slots == [0, 1, 5]
    assert table.num_free == 0
    assert used(table) == [2, 3, 4, 0, 1, 5]


def test_closing_gaps_moves_the_last_slots_and_says_what_to_copy() -> None:
    table = SlotTable(6)
    first, second, third = place(table, 2), place(table, 1), place(table, 2)
    table.free([first])
    assert table.close_gaps() == ([3, 4], [0, 1])
    assert (second.slots, third.slots) == ([2], [0, 1])
    assert table.close_gaps() == ([], [])
    assert place(table, 3).slots == [3, 4, 5]


def test_costly_texts_own_the_last_of_the_used_slots() -> None:
    table = SlotTable(12, has_costly=True)
    costly = place(table, 6)
    first, second = place(table, 2), place(table, 1)
    assert (costly.is_costly, first.is_costly) == (True, False)
    assert table.close_gaps() == ([6, 7, 8, 0, 1, 2], [0, 1, 2, 6, 7, 8])
    assert (first.slots, second.slots, costly.slots) == ([0, 1], [2], [6, 7, 8, 3, 4, 5])
    assert table.close_gaps() == ([], [])
    table.free([first])
    assert table.close_gaps() == ([2, 7, 8], [0, 1, 2])


@pytest.mark.parametrize("has_costly", [False, True])
def test_after_any_order_of_events_every_slot_has_one_owner(has_costly: bool) -> None:
    """A slot that is lost or has two owners would mix up two captions."""
    choose = random.Random(0)
    table = SlotTable(16, has_costly)
    holds = dict.fromkeys(range(16), "")
    """The content of the cache: for each slot, the beam that was last copied there."""
    for _ in range(2000):
        num_slots = choose.randint(1, 8)
        if choose.random() < 0.5 and num_slots <= table.num_free:
            text = place(table, num_slots)
            assert text.is_costly is (has_costly and num_slots > 5)
            holds |= {slot: f"{id(text)} {beam}" for beam, slot in enumerate(text.slots)}
        elif table.texts and choose.random() < 0.5:
            table.free([choose.choice(table.texts)])
        else:
            sources, targets = table.close_gaps()
            holds |= dict(zip(targets, [holds[source] for source in sources], strict=True))
            assert sorted(used(table)) == list(range(table.num_used))
            costly = [slot for text in table.texts if text.is_costly for slot in text.slots]
            assert sorted(costly) == list(range(table.num_used))[table.num_used - len(costly) :]
            for text in table.texts:
                assert [holds[slot] for slot in text.slots] == [
                    f"{id(text)} {beam}" for beam in range(len(text.slots))
                ]
        assert len(set(used(table))) == len(used(table)) == table.num_used == 16 - table.num_free


def test_a_table_shrinks_only_without_texts() -> None:
    table = SlotTable(4)
    text = place(table, 2)
    with pytest.raises(AssertionError, match="must leave their slots"):
        table.shrink(2)
    table.free([text])
    table.shrink(2)
    assert (table.num_free, place(table, 2).slots) == (2, [0, 1])
