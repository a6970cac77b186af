"""`--verbose` and `--log-level`: log messages on standard error, without the secrets of URIs."""

from __future__ import annotations

import logging

from pipeline.storage.secrets import hide_secrets

LEVELS = ("debug", "info", "warning", "error")
LOGGERS = ("blip2_actor", "pipeline")


class SecretsHidden(logging.Formatter):
    """A formatter that hides passwords, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def print_log(level: str) -> None:
    """Print the log messages of our packages from now on.

    Args:
        level: one of `LEVELS`; messages below it are not printed.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SecretsHidden("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.addHandler(handler)
