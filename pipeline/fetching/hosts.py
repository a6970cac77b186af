"""Fetch from web servers with patience: limits for each host, new tries, and pauses that servers ask for.

A server that has failed for the whole patience, whatever was asked of it, is left alone for a while: its
images fail at once, so that a million of them do not hold up the job. `blip2 retry` fetches them again. One
more image is asked for first: nothing else may have been asked for meanwhile.
Without patience, each image is asked for once, and one failure says nothing of the others.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from blip2_actor import FetchError, FetchPolicy, fetch_image

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 15.0
"""Between two tries for an image, if the server does not say how long; each pause is twice as long."""
DOWN_S = 60.0
"""How long a server that fails is left alone."""
MAX_HOSTS = 10_000
"""Hosts that are remembered: a data set of the web may have millions."""


class Hosts:
    """The web servers that one process fetches from. Thread-safe.

    Args:
        policy: what may be fetched.
        per_host: maximum number of requests to a host at the same time.
        patience_s: for how long a fetch is tried again.
        sleep: waits for some seconds.
        clock: tells seconds.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        per_host: int,
        patience_s: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._per_host = per_host
        self._patience_s = patience_s
        self._sleep, self._clock = sleep, clock
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """Return the bytes behind a URL.

        Raises:
            FetchError: as from `fetch_image`, after the last try.
        """
        host = self._host_of(url)
        started, pause_s, num_tries = self._clock(), FIRST_PAUSE_S, 0
        while True:
            with host.slots:
                self._sleep(max(0.0, host.resume_at - self._clock()))
                host.require_up(self._clock())
                try:
                    image = fetch_image(url, self._policy)
                    host.answer(self._clock())
                    return image
                except FetchError as error:
                    failure = error
            num_tries += 1
            if not failure.is_transient:
                if failure.reason in ("answer", "redirects", "size"):
                    host.answer(self._clock())
                raise failure
            wait_s = max(pause_s, failure.retry_after_s or 0.0)
            if self._clock() + wait_s > started + self._patience_s:
                final = _after(num_tries, self._clock() - started, failure)
                if self._patience_s and host.answered_at < started:
                    host.leave_alone(self._clock(), final)
                raise final
            if failure.retry_after_s:
                host.resume_at = self._clock() + failure.retry_after_s
            self._sleep(wait_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _host_of(self, url: str) -> _Host:
        try:
            name = urlsplit(url).netloc.lower()
        except ValueError:
            name = ""  # The fetch refuses the URL.
        with self._lock:
            host = self._hosts.setdefault(name, _Host(self._per_host))
            self._hosts.move_to_end(name)
            if len(self._hosts) > MAX_HOSTS:
                self._hosts.popitem(last=False)
        return host


class _Host:
    """What is known of one web server."""

    def __init__(self, num_slots: int) -> None:
        self.slots = threading.BoundedSemaphore(num_slots)
        self.resume_at = 0.0
        """The server has asked for a pause until then."""
        self.answered_at = 0.0
        """When it has last given an image or a definite answer."""
        self._down_until = 0.0
        self._is_certain = False
        """Whether another image was asked for since the server was found down."""
        self._failure: FetchError | None = None

    def answer(self, now: float) -> None:
        """Note an answer: the server is up."""
        self.answered_at, self._failure = now, None

    def leave_alone(self, now: float, failure: FetchError) -> None:
        """Note that the server is down, if that is not known yet."""
        if self._failure is None or now >= self._down_until:
            self._down_until, self._failure, self._is_certain = now + DOWN_S, failure, False

    def require_up(self, now: float) -> None:
        """Raise FetchError while the server is left alone, but let one image be asked for."""
        failure = self._failure
        if failure is None or now >= self._down_until:
            return
        if not self._is_certain:
            self._is_certain = True
            return
        raise FetchError(failure.reason, f"{failure}; no image of this host is asked for until it may be up")


def _after(num_tries: int, seconds: float, failure: FetchError) -> FetchError:
    """Return the failure of the last try, with the number of tries in its message."""
    wait = f", and asks to wait {failure.retry_after_s:.0f} s" if failure.retry_after_s else ""
    tries = f" ({num_tries} tries in {seconds:.0f} s)" if num_tries > 1 else ""
    return FetchError(failure.reason, f"{failure}{wait}{tries}", failure.http_status, failure.retry_after_s)
