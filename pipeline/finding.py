"""A finding: what one check has found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.storage.secrets import hide_secrets

Verdict = Literal["ok", "warn", "fail"]
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of `blip2 doctor` or `blip2 verify`."""

    subject: str
    verdict: Verdict
    """`warn`: works, but slowly or not for everything; or must be known. `fail`: cannot work, or is wrong."""
    found: str
    remedy: str | None = None
    """What to do; given for everything that is not ok."""

    def lines(self) -> Iterator[str]:
        yield f"{self.verdict:4}  {self.subject}: {self.found}"
        if self.remedy is not None:
            yield f"      {self.remedy}"

    def to_dict(self) -> dict[str, str | None]:
        """Return plain values for `--json`, without the secrets of URIs."""
        return {name: value and hide_secrets(value) for name, value in asdict(self).items()}


def gib(num_bytes: float) -> str:
    """Return a number of bytes in GiB, or in MiB if it is less than one."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):,.0f} MiB"
