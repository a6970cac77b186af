"""Retry a request to a disk that is full for a while, or to a store that answers 503."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
RETRY_FOR_S = 900.0
"""How long the storage may fail before the job gives up: long enough for a person to free a disk."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0

logger = logging.getLogger(__name__)


def retry_on_oserror(
    action: Callable[[], T],
    retry_for_s: float = RETRY_FOR_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Call `action` until it raises no OSError, with a pause before each new try.

    Args:
        action: must be safe to repeat, also after it was carried out and only its answer was lost.
        retry_for_s: raise the OSError when the next try would start later than this; 0 tries once.
    """
    deadline = clock() + retry_for_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except OSError as error:
            if retry_for_s <= 0 or clock() + pause_s > deadline:
                raise
            logger.warning("The storage has failed, trying again in %.1f s: %s", pause_s, error)
            sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
