"""Tell the coordinator what a worker logs: what it does until it is ready, and its warnings."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.storage.secrets import hide_secrets

STARTING = ("blip2_actor.checkpoints.download", "blip2_actor.phases")
"""Loggers whose messages say what an engine does at its start, in words for people."""
MAX_CHARS = 300
MAX_TEXTS = 50
"""Different warnings of one worker."""
_NUMBER = re.compile(r"(?<!Errno )(?<!HTTP )(?<!\d)\d+(?:\.\d+)*")
"""Not a code that says what has failed."""


class StartTeller(logging.Handler):
    """Passes each message on: the last one is what the worker does now."""

    def __init__(self, coordinator: Any, worker: str) -> None:
        super().__init__(logging.INFO)
        self._coordinator = coordinator
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self._coordinator.starts.remote(self._worker, record.getMessage())


@contextmanager
def telling_start(coordinator: Any, worker: str) -> Iterator[None]:
    """Let the coordinator know what this process does inside the block.

    Args:
        coordinator: handle of the job's `Coordinator` actor.
        worker: name of this process.
    """
    teller = StartTeller(coordinator, worker)
    loggers = [logging.getLogger(name) for name in STARTING]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(teller)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(teller)
            logger.setLevel(level)
        with contextlib.suppress(ray.exceptions.RayError):
            coordinator.starts.remote(worker, None)


class WarningCounter(logging.Handler):
    """Counts warnings by their first line, and tells at the first, second, fourth, eighth, … time.

    Numbers do not count as differences: "image 7 is grey" and "image 8 is grey" are one text.
    """

    def __init__(self, coordinator: Any, worker: str) -> None:
        super().__init__(logging.WARNING)
        self._coordinator = coordinator
        self._worker = worker
        self._counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # Logging must not raise, whatever a library passes to it.
            self.handleError(record)
            return
        first_line = hide_secrets(message.strip().partition("\n")[0])
        text = f"{record.name}: {_NUMBER.sub('N', first_line)}"[:MAX_CHARS]
        if text not in self._counts and len(self._counts) >= MAX_TEXTS:
            return
        self._counts[text] += 1
        number = self._counts[text]
        if not number & (number - 1):
            with contextlib.suppress(ray.exceptions.RayError):
                self._coordinator.warned.remote(self._worker, text, number)


def tell_warnings(coordinator: Any, worker: str) -> None:
    """Let the coordinator know of warnings and errors that this process logs.

    Args:
        coordinator: handle of the job's `Coordinator` actor.
        worker: name of this process.
    """
    logging.captureWarnings(True)
    logging.getLogger().addHandler(WarningCounter(coordinator, worker))
