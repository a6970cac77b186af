"""`ProgressSnapshot`: how far a run is at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.progress.wording import count, cut, duration

SEPARATOR = " · "
MOST_IMPORTANT_FIRST = ("trouble", "images", "eta", "failed", "rate", "shards", "busy")
"""Which parts of the line a narrow terminal shows."""


@dataclass(frozen=True, kw_only=True)
class ProgressSnapshot:
    """How far a run is at one moment; the heartbeat stores it by its field names, for `status`."""

    num_rows: int
    """Rows finished in this attempt."""
    num_failed: int
    images_per_s: float
    """Over the last seconds."""
    shards_done: int
    num_shards: int
    left_s: float | None
    """Estimated seconds to go, when that is known."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Busy fraction by stage."""
    trouble: str | None = None
    """What the run waits for, when a store fails."""
    total_rows: float | None = None
    """Rows of this attempt, finished or not, as far as the shards tell; None if they do not."""
    rows_by_stage: Mapping[str, int] = field(default_factory=dict)
    """Rows that have left the stages before captioning: read and decode."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProgressSnapshot:
        """Read what a heartbeat holds; fields of a newer version are left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def line(self) -> str:
        """Return the progress on one line."""
        return SEPARATOR.join(self._all_parts().values())

    def parts(self, max_chars: int, without: tuple[str, ...] = ()) -> dict[str, str]:
        """Return the parts of a line that must not be longer, by their names, in order.

        Args:
            max_chars: leave out what does not fit, the least important first; what still does not fit is cut.
            without: parts that are shown elsewhere.
        """
        parts = {name: text for name, text in self._all_parts().items() if name not in without}
        if "trouble" in parts:
            parts["trouble"] = cut(parts["trouble"], max_chars)
        kept: list[str] = []
        for name in [name for name in MOST_IMPORTANT_FIRST if name in parts]:
            kept.append(name)
            if len(SEPARATOR.join(parts[one] for one in kept)) > max_chars:
                kept.pop()
                break
        shown = {name: text for name, text in parts.items() if name in kept}
        return shown or {"images": cut(parts["images"], max_chars)}

    def _all_parts(self) -> dict[str, str]:
        parts = {"trouble": self.trouble} if self.trouble and self.num_rows else {}
        shards = f"shards {self.shards_done:,}/{self.num_shards:,}"
        if not self.num_rows:
            parts |= {"images": "starting", "shards": shards}
            return parts | ({"trouble": self.trouble} if self.trouble else {})
        parts |= {
            "images": count(self.num_rows, "image"),
            "rate": f"{self.images_per_s:,.1f}/s",
            "failed": f"{self.num_failed:,} failed",
            "shards": shards,
            "eta": f"ETA {duration(self.left_s)}",
        }
        if self.busy and not self.trouble:
            parts["busy"] = "busy " + ", ".join(f"{stage} {part:.0%}" for stage, part in self.busy.items())
        return parts
