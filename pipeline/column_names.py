"""The names of the columns of every output file, without their types.

Settings check the names that users give against these, also when pyarrow is not installed: `blip2 --help`
reads the settings and nothing else. `pipeline.schema` has the types; a test holds both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SCHEMA_VERSION = 2
"""Part of every run's fingerprint; increased when a column or a status changes its meaning. A run is finished
in the version in which it was begun. Version 1 has no `member`, and one row for the images of a sample."""

COLUMN_NAMES = (
    "key",
    "shard",
    "row",
    "member",
    "caption",
    "captions",
    "logprobs",
    "logprob",
    "num_tokens",
    "finish_reason",
    "flags",
    "status",
    "error",
    "width",
    "height",
    "sha256",
)
"""The columns of the row contract, in order."""


def refuse_taken_names(names: Sequence[str], taken: Iterable[str], flag: str) -> None:
    """Raise ValueError if a name is taken or is given twice.

    Args:
        flag: the setting to which the names belong, for the message.
    """
    collisions = sorted(set(names) & set(taken))
    if collisions:
        raise ValueError(
            f"{flag} must not name columns that the output has itself, got {', '.join(collisions)}; "
            "rename or drop them"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{flag} must name each column once, got {', '.join(repeated)} more than once")
