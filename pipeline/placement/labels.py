"""Label selectors: on which nodes a worker may run, as Ray evaluates them."""

from __future__ import annotations

from collections.abc import Mapping


def has_labels(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Return whether a node with these labels is one that all selectors choose.

    Args:
        selectors: by the key of a label: a value, `!value`, `in(a, b)` or `!in(a, b)`. As in Ray, the negated
            ones choose a node without the label.
    """
    return all(_chooses(selector, labels.get(key)) for key, selector in selectors.items())


def _chooses(selector: str, value: str | None) -> bool:
    wanted = selector.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        is_among = value in [each.strip() for each in wanted[3:-1].split(",")]
    else:
        is_among = value == wanted
    return is_among != selector.startswith("!")
