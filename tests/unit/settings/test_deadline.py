"""When a job stops: too late loses rows in flight, too early wastes the machine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pipeline.settings.deadline import RESERVE, stop_time
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("deadline", "end"),
    [
        ("2h30m", NOW + timedelta(hours=2, minutes=30)),
        ("90s", NOW + timedelta(seconds=90)),
        ("1d", NOW + timedelta(days=1)),
        ("45min", NOW + timedelta(minutes=45)),
        ("2026-01-31T18:00", NOW + timedelta(hours=6)),
        ("2026-01-31T18:00:30Z", NOW + timedelta(hours=6, seconds=30)),
        ("2026-01-31T18:00+02:00", NOW + timedelta(hours=4)),
    ],
)
def test_a_job_stops_in_time_for_its_deadline(deadline, end):
    assert stop_time(deadline, NOW) == end - RESERVE


@pytest.mark.parametrize("deadline", ["", "soon", "2h 30m", "-2h", "10s", "0s", "2026-01-31T11:00"])
def test_a_deadline_that_cannot_be_kept_is_refused(deadline):
    with pytest.raises(ValueError, match="deadline must be"):
        stop_time(deadline, NOW)
    with pytest.raises(ValueError, match="deadline must be"):
        CaptionSettings(input=("in",), output="out", deadline=deadline)


@pytest.mark.parametrize(
    "deadline",
    ["9999999999d", "9" * 5000 + "s", "999999999d", "4000d", "9999-01-01", "9999-12-31T23:59:59-12:00"],
)
def test_a_deadline_for_which_there_is_no_timer_is_refused(deadline):
    """It used to be an OverflowError, in the settings or when the timer was set."""
    with pytest.raises(ValueError, match=f"at most 3,650 days from now, got {deadline}"):
        stop_time(deadline, NOW)
    with pytest.raises(ValueError, match="deadline must be"):
        CaptionSettings(input=("in",), output="out", deadline=deadline)


def test_a_deadline_is_not_stored_because_a_later_start_has_another():
    settings = CaptionSettings(input=("in",), output="out", deadline="2h")
    assert from_dict(CaptionSettings, settings.to_dict()).deadline is None
