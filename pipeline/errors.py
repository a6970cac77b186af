"""Why a run ends before its work does."""

from __future__ import annotations


class InputError(ValueError):
    """The input cannot be used as the user named it; the message says what to do about it."""


class Stopped(RuntimeError):
    """The run was stopped; everything finished is kept."""


class TooManyFailures(Stopped):
    """Most of the input fails; the job has stopped early."""
