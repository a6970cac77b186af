"""The fingerprint of a run: everything that decides what its rows say.

The rule: rows with different fingerprints never share an output. A run resumes only if the fingerprint of
its settings equals the stored one. Settings that only decide how fast rows are made (actors, threads, slots)
are not part of it.

Adding a field: every setting that changes rows must enter the fingerprint, but a run that an earlier version
began must still resume. Therefore list the new field in `ADDED_LATER`, with the value that reproduces what
earlier versions did. An entry with that value is left out, so that the digest stays what it was; with any
other value it enters. Never change the value in `ADDED_LATER`, even if the default of the setting changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blip2_actor import Status

GENERATION_CONFIG = "generation_config"
"""Field with the options that the checkpoint's `generation_config.json` sets; a run without it uses none."""
STATUSES = tuple(status.value for status in Status if status is not Status.FETCH_FAILED)
"""The statuses that the schema of every run has. Only a run that fetches gives `fetch_failed`, and its input
or its columns say that it fetches."""
ADDED_LATER: Mapping[str, Any] = {
    "image.accept_truncated": False,
    "columns.fetch": False,
    "columns.encoding": "auto",
    "include": [],
    "exclude": [],
    GENERATION_CONFIG: {},
    "quantize": None,
    "confidence": None,
    "options.min_p": 0.0,
    "options.typical_p": 1.0,
    "options.suppress_tokens": [],
    "options.bad_words_ids": [],
    "options.renormalize_logits": False,
}
"""Fields that are newer than version 0.1.0: dotted name, such as "options.num_beams", to the value with which
this version makes the rows of earlier versions."""


MAX_SHOWN, MAX_SHOWN_CHARS = 10, 200


class FingerprintMismatch(ValueError):
    """The output was begun with other settings."""


@dataclass(frozen=True)
class Fingerprint:
    """The settings that decide the rows, by name."""

    parts: Mapping[str, Any]
    """Nested plain values: model digest, dtype, prompt, options, preprocessing, schema, input."""

    @classmethod
    def of(cls, parts: Mapping[str, Any], added_later: Mapping[str, Any]) -> Fingerprint:
        """Make a fingerprint of values that JSON can hold.

        Args:
            parts: nested values by name; tuples become lists.
            added_later: as `ADDED_LATER`; an entry that equals its value there is left out.
        """
        plain = json.loads(json.dumps(parts))
        return cls(_without_defaults(plain, json.loads(json.dumps(added_later))))

    @property
    def canonical(self) -> str:
        """The same JSON text for equal parts."""
        return json.dumps(self.parts, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical`, in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def differences(self, other: Fingerprint) -> list[str]:
        """Return one phrase per difference: "name: value in other -> value here"."""
        theirs, ours = dict(_flat(other.parts)), dict(_flat(self.parts))
        names = sorted(theirs.keys() | ours.keys())
        filled = {name for name in names if any(longer.startswith(f"{name}.") for longer in names)}
        return [
            f"{name}: {_shown(theirs.get(name))} -> {_shown(ours.get(name))}"
            for name in names
            if theirs.get(name, _MISSING) != ours.get(name, _MISSING) and name not in filled
        ]

    def require_same(self, other: Fingerprint, output: str) -> None:
        """Raise FingerprintMismatch, which names each difference, unless both are equal.

        Args:
            other: the stored fingerprint.
            output: where it is stored.
        """
        differences = self.differences(other)
        if differences:
            num_more = len(differences) - MAX_SHOWN
            if num_more > 0:
                differences = [*differences[:MAX_SHOWN], f"and {num_more} more"]
            raise FingerprintMismatch(
                f"{output} was begun with other settings: {'; '.join(differences)}; "
                "run the first command again, give another --output, "
                "or add --fork to begin a new output next to it"
            )


_MISSING = object()


def _shown(value: object) -> str:
    """Return a value for a message; a list of a thousand inputs must not fill the screen."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def _without_defaults(
    parts: Mapping[str, Any], added_later: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Copy nested parts without the entries that equal their value in `added_later`."""
    kept = {}
    for name, value in parts.items():
        dotted = f"{prefix}{name}"
        if dotted in added_later and value == added_later[dotted]:
            continue
        is_nested = isinstance(value, Mapping)
        kept[name] = _without_defaults(value, added_later, f"{dotted}.") if is_nested else value
    return kept


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
