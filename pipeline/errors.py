"""Why a run ends before its work does."""

from __future__ import annotations


class Stopped(RuntimeError):
    """The run was stopped; everything finished is kept."""


class TooManyFailures(Stopped):
    """Most of the input fails; the job has stopped early."""
