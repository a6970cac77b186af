"""Placeholders in cluster files: `YOUR_BUCKET` and others, which users replace by values of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PLACEHOLDER = re.compile(r"YOUR_[A-Z]+(?:_[A-Z]+)*")


def placeholders(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each text in a document that holds a placeholder, with the placeholder."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from placeholders(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from placeholders(item, f"{path}[{index}]")
    elif isinstance(value, str) and (found := _PLACEHOLDER.search(value)):
        yield path, found.group()
