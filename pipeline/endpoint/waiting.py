"""What the threads of one engine say while their endpoint takes no work: one voice for all."""

from __future__ import annotations

import threading
import time

from pipeline.storage.retrying import MAX_PAUSE_S, TELL_EVERY_S, Trouble, tell


class GivenUp(Exception):
    """The job stops; what it has asked its endpoint for has no outcome."""


class Outage:
    """How long an endpoint has taken no work, and why; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._pause_s = 0.0

    def wait(self, state: str, at_least_s: float, is_ended: threading.Event) -> bool:
        """Pause before the next try, longer each time, and say why; return False to give up.

        The pause is over once a try of another thread has succeeded, but no sooner than the endpoint asks.

        Args:
            state: what is wrong, in a phrase.
            at_least_s: what the endpoint asks for.
            is_ended: set when nobody wants an answer any longer.
        """
        with self._lock:
            since = self._since = self._since or time.monotonic()
            self._pause_s = pause_s = min(max(at_least_s, 2 * self._pause_s), max(MAX_PAUSE_S, at_least_s))
        shown = f"out of reach ({state.replace(';', ',')})"
        now = time.monotonic()
        earliest, next_try = now + at_least_s, now + pause_s
        is_new = True
        while (left_s := next_try - time.monotonic()) > 0:
            with self._lock:  # or this would say that it fails after `end` has said that it works
                if self._since != since:
                    break
                if not tell(Trouble("endpoint", shown, time.monotonic() - since, is_new)):
                    return False
            is_new = False
            if is_ended.wait(min(left_s, TELL_EVERY_S)):
                return False
        return not is_ended.wait(max(0.0, earliest - time.monotonic()))

    def end(self) -> None:
        """Say that the endpoint works again, if it did not."""
        with self._lock:
            if self._since is not None:
                tell(None)
            self._since, self._pause_s = None, 0.0

    def job_goes_on(self) -> bool:
        """Return False if the job stops; during an outage, the threads in `wait` find that out."""
        with self._lock:
            return self._since is not None or tell(None)
