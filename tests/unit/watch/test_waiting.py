"""A wait is reported once it has lasted, at once when its reason changes, and ever less often."""

from __future__ import annotations

from itertools import pairwise

from pipeline.watch.waiting import MAX_EVERY_S, Reminder


def test_a_wait_is_said_after_a_while_when_it_changes_and_ever_less_often():
    now, said = 0.0, []
    reminder = Reminder(lambda text: said.append((now, text)), every_s=10, clock=lambda: now)
    for second in range(200):
        now = float(second)
        reminder.remind("a node" if second < 100 else "an actor")
    assert said[:3] == [
        (10.0, "waiting for a node"),
        (30.0, "waiting for a node"),
        (70.0, "waiting for a node"),
    ]
    assert said[3:] == [
        (100.0, "waiting for an actor"),
        (110.0, "waiting for an actor"),
        (130.0, "waiting for an actor"),
        (170.0, "waiting for an actor"),
    ]


def test_a_short_wait_is_not_said_and_a_second_one_begins_anew():
    now = 0.0
    said: list[str] = []
    reminder = Reminder(said.append, every_s=10, clock=lambda: now)
    for second in range(40):
        now = float(second)
        reminder.remind(None if second % 9 == 0 else "a node")
    assert said == []


def test_the_last_pause_is_bounded():
    now, said = 0.0, []
    reminder = Reminder(lambda text: said.append(now), every_s=10, clock=lambda: now)
    for minute in range(600):
        now = 60.0 * minute
        reminder.remind("a node")
    assert max(after - before for before, after in pairwise(said)) <= MAX_EVERY_S
