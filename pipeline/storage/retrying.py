"""Retry a request to a disk that is full for a while, or to a store that answers 503.

A process has one listener, which is told while requests fail: the driver shows it, a worker passes it on. The
listener also says when to give up, so that a signal is obeyed while a store is down.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from pipeline.storage.secrets import hide_secrets

T = TypeVar("T")
RETRY_FOR_S = 900.0
"""How long the storage may fail before the job gives up: long enough for a person to free a disk."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
TELL_EVERY_S = 1.0
"""Seconds between two calls of the listener during a pause."""

Place = Literal["output", "input", "endpoint"]


class InvalidArgument(OSError):
    """A store's client refuses what it is asked for, such as a malformed name, before it asks the store."""


_NEVER = (FileNotFoundError, PermissionError, IsADirectoryError, InvalidArgument)
_NEVER_ERRNOS = (errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL)
_REFUSED_BY_STORE = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_\w+)"
    r"|\b(ContainerNotFound|AccountIsDisabled|AuthenticationFailed|Authorization[A-Z]\w+)\b"
)
"""Arrow raises a plain OSError for these of S3, and for these of Azure."""
_EXPIRED = re.compile(
    r"\b(ExpiredToken|InvalidAuthenticationInfo)\b|UNKNOWN \(HTTP status 400\) during HeadObject"
)
"""Credentials that have expired; an answer of S3 to HEAD has no code."""

_LOST_UPLOAD = "retry.function=UploadChunk"
"""Google has forgotten an upload in parts, which begins anew; Arrow takes its 404 for a missing file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trouble:
    """A request that fails and is repeated."""

    place: Place
    state: str
    """What is wrong: "full", or "failing" and why."""
    seconds: float
    """For how long it has failed."""
    is_new: bool = False
    """Whether a try has failed just now; False while the next one is awaited."""
    num_held: int = 0
    """Finished rows that wait for the request."""


Listener: TypeAlias = Callable[[Trouble | None], bool]
"""Takes what is wrong, or None when a request has succeeded again; returns whether to go on trying."""


def _always(trouble: Trouble | None) -> bool:
    return True


_listener: Listener = _always
_under_way: dict[int, float] = {}
"""When each thread that waits for a request has begun it."""


def listen(listener: Listener | None) -> None:
    """Let a listener know while requests of this process fail; it may be called by several threads."""
    global _listener
    _listener = _always if listener is None else listener


def tell(trouble: Trouble | None) -> bool:
    """Tell the listener of trouble, or None of its end; return whether to go on trying."""
    return _listener(trouble)


def longest_request_s() -> float:
    """Return for how long this process has waited for the request that has been under way for longest."""
    begun = min(_under_way.copy().values(), default=None)
    return 0.0 if begun is None else time.monotonic() - begun


def retry_on_oserror(
    action: Callable[[], T],
    retry_for_s: float = RETRY_FOR_S,
    place: Place = "output",
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    is_request: bool = True,
) -> T:
    """Call `action` until it raises no OSError, with a pause before each new try.

    An error that a new try cannot change is raised at once; see `is_final`. None holds the secrets of a URI:
    Arrow names the signed URL of a request to Azure.

    Args:
        action: must be safe to repeat, also after it was carried out and only its answer was lost.
        retry_for_s: raise the OSError when the next try would start later than this; 0 tries once.
        place: where the request goes, for the listener.
        is_request: whether the action is one request, for `longest_request_s`; others make requests of their
            own between work that may take long.
    """
    started = clock()
    pause_s, has_failed = FIRST_PAUSE_S, False
    while True:
        try:
            with _noted() if is_request else nullcontext():
                result = action()
        except OSError as error:
            _hide_secrets_of(error)
            if retry_for_s <= 0 or clock() + pause_s > started + retry_for_s or is_final(error, place):
                raise
            has_failed = True
            logger.warning("The %s has failed, trying again in %.1f s: %s", place, pause_s, error)
            next_try = clock() + pause_s
            is_new = True
            while (left_s := next_try - clock()) > 0:
                if not _listener(Trouble(place, _state(error), clock() - started, is_new)):
                    raise
                is_new = False
                sleep(min(left_s, TELL_EVERY_S))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        else:
            if has_failed:
                _listener(None)
            return result


@contextmanager
def _noted() -> Iterator[None]:
    thread = threading.get_ident()
    outer = _under_way.get(thread)
    _under_way.setdefault(thread, time.monotonic())
    try:
        yield
    finally:
        if outer is None:
            del _under_way[thread]


def _hide_secrets_of(error: OSError) -> None:
    error.args = tuple(hide_secrets(one) if isinstance(one, str) else one for one in error.args)
    for name in ("strerror", "filename"):
        text = getattr(error, name)
        if isinstance(text, str):
            setattr(error, name, hide_secrets(text))


def is_final(error: OSError, place: Place = "output") -> bool:
    """Return whether a new try cannot succeed: a file is missing, access is denied, a name is too long.

    For an output, new credentials are awaited: a client reads the file that they are in again.
    """
    if isinstance(error, FileNotFoundError) and _LOST_UPLOAD in str(error):
        return False
    is_refused = isinstance(error, _NEVER) or error.errno in _NEVER_ERRNOS
    refusals = (_REFUSED_BY_STORE, _EXPIRED) if place == "input" else (_REFUSED_BY_STORE,)
    return is_refused or any(refusal.search(str(error)) for refusal in refusals)


def _state(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "full"
    return f"failing ({hide_secrets(' '.join(str(error).split()))[:200]})"
