"""Who takes part in the next decode step, where a step costs by its rows.

On a CPU, a text of 16 beams makes the steps of every text next to it several times as long. So the texts of
requests with many slots sit out steps while others run: what they add to the time of steps is at most half
of it. Where they add little, they sit out few. On a GPU a step takes about as long for any number of rows,
and everybody takes part in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from blip2_actor.engine.slot_table import RunningText


class StepShares:
    """Lets costly texts and the others share the time of decode steps."""

    def __init__(self, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._clock_s = clock_s
        self._step_s: float | None = None
        """What the last step without costly texts took while there were some; None if there was none yet."""
        self._owed_s = 0.0
        """What costly texts have taken of the others and not given back. It stays while either are away."""

    @contextmanager
    def next_texts(self, texts: Sequence[RunningText]) -> Iterator[Sequence[RunningText]]:
        """Choose those that take part in the next step, which is what the block does."""
        others = [text for text in texts if not text.is_costly]
        if not others or len(others) == len(texts):
            yield texts
            return
        costly_sit_out = self._step_s is None or self._owed_s > 0
        began_s = self._clock_s()
        yield others if costly_sit_out else texts
        seconds = self._clock_s() - began_s
        if costly_sit_out:
            self._step_s = seconds
            self._owed_s -= seconds
        elif self._step_s is not None:
            self._owed_s = seconds - self._step_s
