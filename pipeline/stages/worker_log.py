"""Where a log message of a worker comes from: its run, its node, and the shard that is worked on.

With `--log-level` Ray writes the messages of a job's workers as JSON (`ray.LoggingConfig`), with its own ids
of job, node and task. What is added here is in the words of the output.
"""

from __future__ import annotations

import logging
import os

from pipeline.errors import SHARD
from pipeline.metrics import run_of_job
from pipeline.storage.secrets import hide_secrets


def worker_name() -> str:
    """Return the name of this process, by which the coordinator and the driver know it."""
    return f"{os.uname().nodename}-{os.getpid()}"


class Origin(logging.Filter):
    """Adds `run`, `node` and `shard` to messages that lack them, and hides the secrets of URIs."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._origin = {"run": run, "node": os.uname().nodename}

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (self._origin | {"shard": SHARD.get()}).items():
            if value and not hasattr(record, name):
                setattr(record, name, value)
        try:
            record.msg, record.args = hide_secrets(record.getMessage()), None
        except Exception:  # The handler says so: logging must not raise, whatever a library passes to it.
            return True
        if record.exc_info:
            record.exc_text = hide_secrets(logging.Formatter().formatException(record.exc_info))
        return True


def tell_origins() -> None:
    """Let the log messages of this worker say where they come from."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, Origin) for each in handler.filters):
            handler.addFilter(Origin(run_of_job()))
