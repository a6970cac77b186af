"""Working through a bad spell: a disk that is full for a while, a store that answers 503."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
RETRY_FOR_S = 900.0
"""How long a bad spell may last before the job gives up: long enough for a person to free a disk."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0

logger = logging.getLogger(__name__)


def retry_on_oserror(
    action: Callable[[], T],
    retry_for_s: float = RETRY_FOR_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do something that is safe to do twice until it works; an OSError is tried again for a while."""
    deadline = clock() + retry_for_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except OSError as error:
            if clock() + pause_s > deadline:
                raise
            logger.warning("The storage has failed, trying again in %.1f s: %s", pause_s, error)
            sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
