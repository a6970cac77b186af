"""Why a run ends before its work is done."""

from __future__ import annotations


class Stopped(RuntimeError):
    """The run was stopped; finished work is kept."""


class TooManyFailures(Stopped):
    """Most rows of the input fail; the job stops early."""


class OutputInUse(RuntimeError):
    """Another driver works on this output."""


class EngineFault(RuntimeError):
    """The engine or its device has failed, and every request with it: the process should end."""
