"""`Attempt`: the record of one start of a run, from its first second to its exit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

STAGES = ("decode", "caption", "write")
"""The stages whose busy seconds are measured, in the order of the rows."""


@dataclass(frozen=True)
class WorkerLoad:
    """How busy one worker of a stage was."""

    busy_s: float
    alive_s: float


@dataclass(frozen=True)
class Point:
    """How far an attempt was at one moment. All values count from its start."""

    seconds: float
    rows: int
    """Rows that have reached a fragment."""
    busy_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds in which the workers of each stage worked, all of them together."""
    alive_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds for which the workers of each stage existed, all of them together."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run. A record that a killed driver has left lacks `ended_s` and all after it."""

    id: str
    run: str
    """Digest of the fingerprint of the run."""
    run_id: str = ""
    """Id of the run; empty in records of older versions."""
    begun: str
    """When the attempt began: UTC by the driver's clock, in ISO 8601."""
    is_retry: bool = False
    command: str = ""
    """The command line, without secrets."""
    model: str = ""
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages that decide what a run does."""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    """The hardware at the end of the work if the attempt got that far, else at the start."""
    workers: Mapping[str, int] = field(default_factory=dict)
    """Maximum number of workers of each stage at work at the same time; older versions did not record it."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each phase of the start, in order."""
    ready_s: float | None = None
    """When the first captioning worker was ready; None if none ever was."""
    points: Sequence[Point] = ()
    shard_rows: float | None = None
    """Mean number of rows of the shards of known length; the next attempt estimates with it what is left."""
    warnings: Mapping[str, int] = field(default_factory=dict)
    """Warnings of workers, and how often each was given."""
    quantization: Mapping[str, int] = field(default_factory=dict)
    """What workers have quantized and how near the result is, and how many of them."""
    ended_s: float | None = None
    exit_status: int | None = None
    reason: str | None = None
    """Why the attempt ended."""
    num_attempts: int = 1
    """Number of attempts that the record stands for; if more than 1, only their sums are kept."""
    folded: str | None = None
    """Id of the last of these; its own record no longer counts."""

    @property
    def rows(self) -> int:
        return self.points[-1].rows if self.points else 0

    @property
    def active_s(self) -> float:
        """Seconds from the first captioning worker to the last news, without start-up and shutdown."""
        if self.ready_s is None or not self.points:
            return 0.0
        return max(0.0, self.points[-1].seconds - self.ready_s)

    @property
    def begun_at(self) -> datetime:
        return datetime.fromisoformat(self.begun)

    @property
    def ending(self) -> str:
        """How the attempt ended, as a phrase."""
        return self.reason or "no record of its end: still running, killed, or its machine was lost"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attempt:
        """Read a record; fields of a newer version are left out."""
        known = {f.name for f in dataclasses.fields(cls)} & set(values)
        points = tuple(Point(**point) for point in values.get("points", ()))
        return cls(**{name: values[name] for name in known} | {"points": points})


@dataclass(frozen=True)
class Attempts:
    """All attempts of a run, oldest first, and what they did together."""

    all: tuple[Attempt, ...] = ()

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self.all)

    def __len__(self) -> int:
        return sum(attempt.num_attempts for attempt in self.all)

    @property
    def rows(self) -> int:
        """Rows that the recorded attempts have made. A killed one may have made a few more."""
        return sum(attempt.rows for attempt in self.all)

    @property
    def active_s(self) -> float:
        return sum(attempt.active_s for attempt in self.all)

    @property
    def rows_per_s(self) -> float | None:
        """Rows per active second, or None if no attempt is recorded that has made rows."""
        return self.rows / self.active_s if self.rows and self.active_s else None

    @property
    def last_ready(self) -> Attempt | None:
        """The last attempt that had a captioning worker, else the last one; None if there is none."""
        ready = [attempt for attempt in self.all if attempt.ready_s is not None] or self.all
        return ready[-1] if ready else None

    @property
    def longest(self) -> Attempt | None:
        """The attempt that has worked longest; None if there is none."""
        return max(self.all, key=lambda attempt: attempt.active_s, default=None)

    @property
    def shard_rows(self) -> float | None:
        """Mean number of rows of a shard, as the last attempt knew it; None if none did."""
        known = [attempt.shard_rows for attempt in self.all if attempt.shard_rows is not None]
        return known[-1] if known else None

    def start_s(self, model: str, dtype: str) -> float | None:
        """Return how long the last start with a model took until a worker was ready; None if none was."""
        known = [one.ready_s for one in self.all if (one.model, one.dtype) == (model, dtype) and one.phases]
        return next((seconds for seconds in reversed(known) if seconds is not None), None)

    @property
    def busy_s(self) -> Counter[str]:
        return _total(attempt.points[-1].busy_s for attempt in self.all if attempt.points)

    @property
    def alive_s(self) -> Counter[str]:
        """Seconds for which the workers of each stage existed, all of them together."""
        return _total(attempt.points[-1].alive_s for attempt in self.all if attempt.points)

    @property
    def busy_fractions(self) -> dict[str, float]:
        """The busy share of each stage: busy seconds over seconds of existence, of all its workers."""
        alive_s, busy_s = self.alive_s, self.busy_s
        return {stage: min(1.0, busy_s[stage] / alive_s[stage]) for stage in STAGES if alive_s[stage]}

    @property
    def warnings(self) -> Counter[str]:
        return _total(attempt.warnings for attempt in self.all)

    @property
    def quantization(self) -> Counter[str]:
        return _total(attempt.quantization for attempt in self.all)


def _total(mappings: Iterable[Mapping[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for mapping in mappings:
        total.update(mapping)
    return total


def fold(first: Attempt, second: Attempt) -> Attempt:
    """Return one record with the sums of two attempts, the first of which may have been folded before."""
    points = [attempt.points[-1] for attempt in (first, second) if attempt.points]
    last = Point(
        seconds=first.active_s + second.active_s,
        rows=first.rows + second.rows,
        busy_s=dict(_total(point.busy_s for point in points)),
        alive_s=dict(_total(point.alive_s for point in points)),
    )
    num_attempts = first.num_attempts + second.num_attempts
    longest = Attempts((first, second)).longest or second
    return dataclasses.replace(
        first,
        hardware=longest.hardware,
        workers=longest.workers,
        phases={},
        ready_s=0.0,
        points=(last,),
        shard_rows=second.shard_rows,
        warnings=dict(Attempts((first, second)).warnings.most_common(MAX_WARNINGS)),
        quantization=dict(Attempts((first, second)).quantization.most_common(MAX_WARNINGS)),
        ended_s=None,
        exit_status=None,
        reason=f"{num_attempts:,} attempts, of which only the sums are kept",
        num_attempts=num_attempts,
        folded=second.id,
    )


MAX_WARNINGS = 50
"""Different warnings that one record keeps."""
