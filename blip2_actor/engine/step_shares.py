"""Which texts take part in the next decode step, if the cost of a step grows with its rows.

On a CPU, a text of 16 beams makes the steps of every text next to it several times as long. So the texts of
requests with many slots sit out steps while others run: they add at most half of the time of steps. If they
add little, they sit out few. On a GPU a step takes about as long for any number of rows, and all texts take
part in every step.
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
        """Duration of the last step that costly texts sat out; None before the first."""
        self._owed_s = 0.0
        """Time that costly texts have taken from the others and not given back yet."""

    @contextmanager
    def next_texts(self, texts: Sequence[RunningText]) -> Iterator[Sequence[RunningText]]:
        """Choose the texts for the next step, which the block takes."""
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
