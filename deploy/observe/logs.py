"""Where Serve's logs go, in which form, and how much they say. Serve writes one file for each replica."""

from __future__ import annotations

import logging
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]


def serve_logging(level: LogLevel) -> dict[str, Any]:
    """Return Serve's `logging_config`: JSON lines, with our access log in place of Serve's."""
    return {"encoding": "JSON", "log_level": level.upper(), "enable_access_log": False}


def set_log_level(level: LogLevel) -> None:
    """Change how much the logs of this process say, until it ends."""
    logging.getLogger("ray.serve").setLevel(level.upper())
