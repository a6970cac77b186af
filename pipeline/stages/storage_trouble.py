"""Report trouble with a store, from the worker that meets it to the person who can end it.

A worker whose request fails tells the coordinator about once a second, and asks whether to go on trying. The
driver fetches what all workers say, and shows one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from pipeline.metrics import STORE_RETRIES, label_with_run
from pipeline.progress import count, duration
from pipeline.stages.worker_log import tell_origins, worker_name
from pipeline.storage.retrying import Trouble, listen

SAID_AFTER_S = 2.0
ANSWER_S = 5.0
"""How long a worker waits for the coordinator; then it goes on trying."""


def tell_coordinator(coordinator: Any, count_held: Callable[[], int] = int) -> None:
    """Let the coordinator know while requests of this process fail; label its metrics and its log.

    Args:
        coordinator: handle of the job's `Coordinator` actor.
        count_held: returns how many finished rows this process has not written yet.
    """
    label_with_run()
    tell_origins()
    worker = worker_name()

    def tell(trouble: Trouble | None) -> bool:
        if trouble is not None:
            trouble = replace(trouble, num_held=count_held())
            if trouble.is_new:
                STORE_RETRIES.inc(1, {"place": trouble.place})
        try:
            return ray.get(coordinator.report_trouble.remote(worker, trouble), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return True

    listen(tell)


def describe(troubles: Sequence[Trouble]) -> str | None:
    """Return one phrase about the request that has failed for longest, or None if all is well.

    Requests that succeed at the second or third try are not mentioned.
    """
    worst = max(troubles, key=lambda trouble: trouble.seconds, default=None)
    if worst is None or worst.seconds < SAID_AFTER_S:
        return None
    phrase = f"{worst.place} has been {worst.state} for {duration(worst.seconds)}; waiting"
    num_held = sum(trouble.num_held for trouble in troubles)
    return f"{phrase}, {count(num_held, 'row')} held" if num_held else phrase
