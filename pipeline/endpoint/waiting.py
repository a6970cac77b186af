"""What an engine says while its endpoint takes no work, once for all its threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from pipeline.storage.retrying import MAX_PAUSE_S, RETRY_FOR_S, TELL_EVERY_S, Trouble, tell

KEY_PATIENCE_S = RETRY_FOR_S
"""How long a key may be refused before the job gives up: long enough for a person to allow it again."""


class GivenUp(Exception):
    """The job stops; requests to its endpoint end without an outcome."""


@dataclass(frozen=True)
class KeyRefused(Trouble):
    """The endpoint has refused the key for `KEY_PATIENCE_S`; the driver ends the job."""


class Outage:
    """How long an endpoint has taken no work, and why; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._key_refused_since: float | None = None
        self._pause_s = 0.0

    def wait(
        self, state: str, at_least_s: float, is_ended: threading.Event, refuses_key: bool = False
    ) -> bool:
        """Pause before the next try, longer each time, and say why; return False to give up.

        The pause is over once a try of another thread has succeeded, but no sooner than the endpoint asks.

        Args:
            state: what is wrong, in a phrase.
            at_least_s: minimum pause, which the endpoint asks for.
            is_ended: set when no answer is needed any longer.
            refuses_key: the endpoint answers, and waiting alone does not help.
        """
        now = time.monotonic()
        with self._lock:
            since = self._since = self._since or now
            self._key_refused_since = (self._key_refused_since or now) if refuses_key else None
            give_up_at = KEY_PATIENCE_S + (self._key_refused_since or now)
            self._pause_s = pause_s = min(max(at_least_s, 2 * self._pause_s), max(MAX_PAUSE_S, at_least_s))
        shown = f"{'refusing the key' if refuses_key else 'out of reach'} ({state.replace(';', ',')})"
        earliest, next_try = now + at_least_s, now + pause_s
        is_new = True
        while (left_s := next_try - time.monotonic()) > 0:
            with self._lock:  # otherwise this could report a failure after `end` has reported success
                if self._since != since:
                    break
                kind = KeyRefused if refuses_key and time.monotonic() > give_up_at else Trouble
                if not tell(kind("endpoint", shown, time.monotonic() - since, is_new)):
                    return False
            is_new = False
            if is_ended.wait(min(left_s, TELL_EVERY_S)):
                return False
        return not is_ended.wait(max(0.0, earliest - time.monotonic()))

    def end(self) -> None:
        """Report that the endpoint works again, if it did not."""
        with self._lock:
            if self._since is not None:
                tell(None)
            self._since, self._key_refused_since, self._pause_s = None, None, 0.0

    def job_goes_on(self) -> bool:
        """Return False if the job stops; during an outage, the threads in `wait` find that out."""
        with self._lock:
            return self._since is not None or tell(None)
