"""`--verbose`: log messages on standard error, without the secrets of URIs."""

from __future__ import annotations

import logging

from pipeline.storage.secrets import hide_secrets

LOGGERS = ("blip2_actor", "pipeline")


class SecretsHidden(logging.Formatter):
    """A formatter that hides passwords, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def print_log() -> None:
    """Print the log messages of our packages from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(SecretsHidden("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
