"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}; fetch it again") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(stored).__name__}; fetch it again")
    return stored
