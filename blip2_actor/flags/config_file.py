"""A configuration file: TOML with a part for each command, whose keys are flags without the dashes.

    [caption]
    model = "Salesforce/blip2-opt-2.7b"
    num-beams = 5

Its values are turned into the words of a command line, so that they are read and refused as flags are.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from blip2_actor.flags.suggestions import did_you_mean


def read_parts(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the parts with these names; a later part overrules an earlier one.

    Raises:
        ValueError: the file cannot be read, is not TOML, or has none of the parts.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config must be a file that can be read, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise ValueError(f"--config must be a TOML file, got {path}: {error}") from None
    for key, value in document.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: {key} must stand in the part of a command, such as [{names[-1]}]")
    if not set(names) & set(document):
        have = f"it has {', '.join(f'[{name}]' for name in document)}" if document else "it is empty"
        near = did_you_mean(names[-1], document)
        raise ValueError(f"{path} must have a part [{names[-1]}], but {have}{near}")
    values: dict[str, Any] = {}
    for name in names:
        part = document.get(name, {})
        flags = {key.replace("_", "-"): key for key in part}
        for key in part.keys() - flags.values():
            twin = flags[key.replace("_", "-")]
            raise ValueError(f"{path}: {key} and {twin} are the same flag; leave one of them out")
        values |= {flag: part[key] for flag, key in flags.items()}
    return values


def as_words(flag: str, value: Any, is_switch: bool) -> list[str]:
    """Return a value of a file as the words of a command line.

    Raises:
        ValueError: the value is of a kind that the flag cannot have.
    """
    if is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{flag} must be true or false, got {json.dumps(value, default=str)}")
        return [flag if value else f"--no-{flag[2:]}"]
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{flag} must be a text, a number or a list, got a table")
    return [f"{flag}={_text(item)}" for item in items]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))  # ids of one sequence, as on the command line
    return json.dumps(value)
