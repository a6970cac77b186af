"""Wait for the cluster, and say for what, since when, and what the autoscaler does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray

from pipeline.progress import LOG_EVERY_S
from pipeline.watch.autoscaler import autoscaler_says

Say = Callable[[str], Any]
"""Prints a line for people."""
LOOK_EVERY_S = 2.0
MAX_EVERY_S = 600.0
"""Maximum seconds between two lines that say the same, in a long wait."""


def at(moment: datetime) -> str:
    """Return a time of day in words, with the date unless it is today."""
    is_today = moment.date() == datetime.now(UTC).date()
    return f"{moment:%H:%M:%S} UTC" if is_today else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


class Reminder:
    """Says what the job waits for: after a few seconds, on a new reason, and then ever less often."""

    def __init__(
        self, say: Say, every_s: float = LOG_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._first_s, self._clock = say, every_s, clock
        self._said: str | None = None
        self._next: float | None = None
        """When to say it again; None if the job does not wait."""
        self._every_s = every_s

    def remind(self, awaited: str | None) -> None:
        """Take what the job waits for now; None if it does not wait."""
        now = self._clock()
        if awaited is None:
            self._next = self._said = None
            return
        if self._next is None:
            self._every_s, self._next = self._first_s, now + self._first_s
        is_news = self._said is not None and awaited != self._said
        if now < self._next and not is_news:
            return
        self._say(f"waiting for {awaited}")
        self._said = awaited
        self._every_s = self._first_s if is_news else min(2 * self._every_s, MAX_EVERY_S)
        self._next = now + self._every_s


def wait_for(answer: Any, what: str, say: Say) -> Any:
    """Return the value of an object reference; say now and then that the job waits for it.

    Args:
        what: what the job waits for, in words.

    Raises:
        ray.exceptions.RayError: the task has failed.
    """
    since = datetime.now(UTC)
    reminder = Reminder(say)
    while True:
        done, _ = ray.wait([answer], timeout=LOOK_EVERY_S)
        if done:
            return ray.get(answer)
        reminder.remind(f"{what} since {at(since)}{autoscaler_says()}")
