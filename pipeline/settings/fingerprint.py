"""The fingerprint of a run: everything that decides what its rows say.

Rows of different fingerprints never share an output. What only decides how fast they come (actors,
threads, slots) is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class FingerprintMismatch(ValueError):
    """The output was begun with other settings."""


@dataclass(frozen=True)
class Fingerprint:
    """Nested plain values: model digest, dtype, prompt, options, preprocessing, schema, input."""

    parts: Mapping[str, Any]

    @property
    def canonical(self) -> str:
        return json.dumps(self.parts, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def differences(self, other: Fingerprint) -> list[str]:
        """One sentence part per difference, as "name: theirs -> ours"."""
        theirs, ours = dict(_flat(other.parts)), dict(_flat(self.parts))
        return [
            f"{name}: {theirs.get(name, 'nothing')!r} -> {ours.get(name, 'nothing')!r}"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name, _MISSING) != ours.get(name, _MISSING)
        ]

    def require_same(self, other: Fingerprint, where: str) -> None:
        """Raise FingerprintMismatch, naming each difference, unless both are equal."""
        differences = self.differences(other)
        if differences:
            raise FingerprintMismatch(
                f"the settings must be those that {where} was begun with, got "
                + "; ".join(differences)
                + "; run the first command again, give another --output, "
                "or add --fork to begin a fresh output beside it"
            )


_MISSING = object()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
