"""Patience with the hub: an answer that asks to come back later ends no worker.

A hundred workers that start together reach the hub's rate limit. The hub's own library repeats some requests
a few times; a model of many files needs more than that.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATIENCE_S = 1800.0
"""After this time of such answers the hub counts as out of reach."""
MAX_PAUSE_S = 300.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that ask to come back later."""


def retry_while_busy(request: Callable[[], T], sleep: Callable[[float], Any] = time.sleep) -> T:
    """Return what a request to the hub returns; while the hub is busy, make it again.

    Pauses are as long as `Retry-After` asks, else they double from a second on. A part of each is random, so
    that workers that were refused together do not come back together.

    Raises:
        Exception: the request has failed for another reason, or for `PATIENCE_S` seconds.
    """
    give_up_at = time.monotonic() + PATIENCE_S
    pause_s = 1.0
    while True:
        try:
            return request()
        except Exception as error:
            answer = busy_answer(error)
            if answer is None or time.monotonic() > give_up_at:
                raise
        asked = answer.headers.get("Retry-After", "")
        wait_s = min(MAX_PAUSE_S, float(asked) if asked.isdecimal() else pause_s)
        pause_s *= 2
        logger.warning("the hub is busy (HTTP %d); asking again in %.0f s", answer.status_code, wait_s)
        sleep(wait_s * random.uniform(1.0, 1.2))


def busy_answer(error: BaseException | None) -> Any:
    """Return the HTTP response that has caused an exception, if it asks to come back later; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in BUSY:
            return response
        error = error.__cause__ or error.__context__
    return None
