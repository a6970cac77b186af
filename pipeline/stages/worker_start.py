"""Tell the coordinator what a captioning worker does until it is ready: fetch, load, test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

STARTING = ("blip2_actor.checkpoints.download", "blip2_actor.phases")
"""Loggers whose messages say what an engine does at its start, in words for people."""


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
