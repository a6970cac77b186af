"""`CaptionCounts`: counts that show that the captions of a run are useless, although every row is ok.

A broken checkpoint, a wrong dtype or a prompt that hides the image gives empty captions, or the same one for
every image. The counts of a shard are in the footer of its file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.progress.wording import cut

REGENERATED = "regenerated"
"""The flag of a caption that was generated again, because the first one had flags; it is no fault itself."""
NO_FAULTS = {REGENERATED, "truncated", "abstained"}
"""Flags that say something else of a row than that its caption looks wrong."""
MIN_CAPTIONS = 20
"""Number of captions from which on equal ones count; a few may well be the same."""
MAX_SAME_FRACTION = 0.5
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class CaptionCounts:
    """How many captions there are, and how many look wrong."""

    num_captions: int = 0
    num_flagged: int = 0
    num_same: int = 0
    """How often the most frequent caption occurs; of several shards, at least how often."""
    same: str | None = None
    """The most frequent caption."""

    @classmethod
    def of_rows(cls, rows: pa.Table) -> CaptionCounts:
        """Count the captions of an output's rows."""
        if "caption" not in rows.column_names:
            return cls()
        made = rows.filter(pc.is_valid(rows["caption"]))
        flags = (set(of_row or ()) - NO_FAULTS for of_row in made["flags"].to_pylist())
        (same, num_same), *_ = Counter(made["caption"].to_pylist()).most_common(1) or [(None, 0)]
        return cls(len(made), sum(map(bool, flags)), num_same, same)

    @classmethod
    def sum_of(cls, counts: Iterable[CaptionCounts]) -> CaptionCounts:
        """Add the counts of several shards."""
        same: Counter[str | None] = Counter()
        num_captions = num_flagged = 0
        for part in counts:
            num_captions += part.num_captions
            num_flagged += part.num_flagged
            same[part.same] += part.num_same
        (caption, num_same), *_ = same.most_common(1) or [(None, 0)]
        return cls(num_captions, num_flagged, num_same, caption)

    @property
    def are_the_same(self) -> bool:
        """Whether so many captions are the same that they cannot describe different images."""
        return self.num_captions >= MIN_CAPTIONS and self.num_same > MAX_SAME_FRACTION * self.num_captions

    @property
    def flagged_fraction(self) -> float:
        """Share of the captions that are flagged, or that are the same if most are."""
        num_bad = max(self.num_flagged, self.num_same if self.are_the_same else 0)
        return num_bad / self.num_captions if self.num_captions else 0.0

    def warnings(self) -> list[str]:
        """Return a line for each thing that looks wrong."""
        lines = []
        if self.num_flagged:
            share = self.num_flagged / self.num_captions
            lines.append(
                f"warning: {self.num_flagged:,} of {self.num_captions:,} captions are flagged ({share:.1%}): "
                "empty, looping or echoing the prompt; `blip2 report` counts them"
            )
        if self.are_the_same and self.same:
            lines.append(
                f"warning: {self.num_same:,} of {self.num_captions:,} captions are the same "
                f"({cut(self.same, MAX_SHOWN_CHARS)!r}); check the checkpoint, --dtype and --prompt"
            )
        return lines
