"""`--deadline`: when a job must have ended, as a duration or as a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

RESERVE = timedelta(seconds=20)
"""A job stops this long before its deadline, to write what is finished and to end its processes."""
LONGEST = timedelta(days=3650)
"""Longer durations are mistakes, and the times that they lead to have no room in a `datetime` or a timer."""
_DURATION = re.compile(
    r"(?:(?P<days>\d+)d)?(?:(?P<hours>\d+)h)?(?:(?P<minutes>\d+)m(?:in)?)?(?:(?P<seconds>\d+)s)?"
)


def stop_time(deadline: str | None, now: datetime | None = None) -> datetime | None:
    """Return when a job must begin to stop; None without a deadline.

    Args:
        deadline: a duration from now, such as 2h30m, or a time in ISO 8601, in UTC unless it says otherwise.
        now: with a time zone; default: what the clock says.

    Raises:
        ValueError: the deadline is neither, or it comes too soon or too late.
    """
    if deadline is None:
        return None
    now = now or datetime.now(UTC)
    at = _parse(deadline, now)
    if at is None or at > now + LONGEST:
        raise ValueError(
            f"deadline must be at most {LONGEST.days:,} days from now, got {deadline}; "
            "leave it out for a job without one"
        )
    if at < now + RESERVE:
        raise ValueError(
            f"deadline must be at least {RESERVE.seconds} s from now, got {deadline} at {now:%Y-%m-%dT%H:%M}"
        )
    return at - RESERVE


def time_left(deadline: str) -> timedelta:
    """Return the time until a deadline that was accepted before; it is negative when the deadline is over."""
    now = datetime.now(UTC)
    at = _parse(deadline, now)
    assert at is not None
    return at - now


def _parse(deadline: str, now: datetime) -> datetime | None:
    """Return the time that a deadline names, or None if it is too late for a `datetime`."""
    duration = _DURATION.fullmatch(deadline)
    if duration and deadline:
        try:
            return now + timedelta(**{unit: int(n) for unit, n in duration.groupdict(default="0").items()})
        except (OverflowError, ValueError):  # the latter of more digits than Python reads
            return None
    try:
        at = datetime.fromisoformat(deadline)
    except ValueError:
        raise ValueError(
            "deadline must be a duration such as 2h30m or a UTC time such as 2026-01-31T18:00, "
            f"got {deadline}"
        ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
