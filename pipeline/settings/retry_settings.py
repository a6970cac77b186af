"""The settings of `blip2 retry`: what may differ from the earlier run without changing its rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from blip2_actor import ImageLimits
from pipeline.settings.deadline import stop_time
from pipeline.settings.job_settings import require_fraction
from pipeline.settings.placement import Placement


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """Run the failed rows of an output again, and read its partial shards again."""

    output: str
    """Folder or URI of an earlier run."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""
    max_failed_fraction: float = 0.0
    """Exit with status 2 if a larger fraction of all rows still fails."""
    max_flagged_fraction: float = 1.0
    """Exit with status 2 if a larger fraction of all captions is flagged (empty, looping or echoing the
    prompt), or if most captions are the same; 1 means that flags do not count."""
    deadline: str | None = None
    """When the job must have ended: a duration such as 2h30m, or a UTC time such as 2026-01-31T18:00. It
    stops in time to write what is finished, and the same command resumes it."""
    image_cpu_s: float | None = None
    """Maximum CPU seconds for one image from now on; default: as in the earlier run."""
    image_wall_s: float | None = None
    """Maximum wall-clock seconds for one image from now on; default: as in the earlier run."""
    image_memory_bytes: int | None = None
    """Address space of a decoding process from now on; default: as in the earlier run."""
    placement: Placement = field(default=Placement())
    """actors"""

    def __post_init__(self) -> None:
        require_fraction("max_failed_fraction", self.max_failed_fraction)
        require_fraction("max_flagged_fraction", self.max_flagged_fraction)
        if self.deadline is not None:
            stop_time(self.deadline, datetime.now(UTC))
        self.limits(ImageLimits())

    def limits(self, before: ImageLimits) -> ImageLimits:
        """Return the limits of the earlier run, with the changes that are given here.

        None of these limits is part of the fingerprint.

        Raises:
            ValueError: a limit is not above 0.
        """
        given: dict[str, Any] = {
            "cpu_s": self.image_cpu_s,
            "wall_s": self.image_wall_s,
            "memory_bytes": self.image_memory_bytes,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(before, **changes)
