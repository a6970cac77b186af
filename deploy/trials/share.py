"""Which requests a trial has: a share of them, by a hash, so that the same request is always in or out."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

Kind = Literal["ab_test", "shadow"]


@dataclass(frozen=True)
class Share:
    """A share of the requests, for one model."""

    kind: Kind
    model: str
    """Its name, one of `Settings.other_models`."""
    share: float

    @classmethod
    def parse(cls, kind: Kind, given: str, models: Container[str]) -> Share:
        """Read NAME=SHARE.

        Raises:
            ValueError: it has another form, names no other model, or the share is not above 0 and at most 1.
        """
        name, _, number = given.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if name not in models or not 0 < share <= 1:
            raise ValueError(
                f"{kind} must be NAME=SHARE, got {given!r}: a name of other_models, and a number above 0 and "
                "at most 1"
            )
        return cls(kind, name, share)

    def has(self, request: str) -> bool:
        """Return whether a request is in the share.

        Args:
            request: what identifies it.
        """
        digest = hashlib.sha256(f"{self.kind}:{request}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64
