"""What `blip2 status` prints: what the output folder holds, and what has changed in the input.

The command works while a driver writes to the output, and at any time afterwards. It takes no lease,
and it needs no Ray and no model. It lists the input, but opens none of the files that the run knows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.attempts.attempt import Attempts
from pipeline.attempts.refusal import Refusal, last_refusal
from pipeline.attempts.store import read_attempts
from pipeline.errors import InputError
from pipeline.ledger.layout import lease_name
from pipeline.ledger.lease import BEAT_S, Holder, driver_at_work
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.progress import ProgressSnapshot, count, duration
from pipeline.report.pace import attempt_lines
from pipeline.storage.folder import Folder

SILENT_AFTER_S = 4 * BEAT_S


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What an output holds of its run at one moment."""

    ledger: Ledger
    run: Run
    done: Reconciliation
    num_open_shards: int
    """Shards without a file that have finished rows."""
    rows_in_progress: int
    """Finished rows of these shards."""
    attempts: Attempts
    refusal: Refusal | None
    """Why a submitted job was refused since the last attempt."""

    @classmethod
    def read(cls, uri: str) -> RunStatus:
        """Read an output folder.

        Raises:
            ValueError: the folder holds no run.
        """
        ledger = Ledger(Folder(uri))
        run = ledger.require_run()
        ledger = ledger.of(run)
        state = ledger.scan()
        open_shards = {name: found for name, found in state.fragments.items() if name not in state.finished}
        attempts = read_attempts(ledger.folder)
        refusal = last_refusal(ledger.folder)
        is_old = refusal is not None and any(refusal.time < attempt.begun for attempt in attempts)
        return cls(
            ledger=ledger,
            run=run,
            done=ledger.reconcile(run, state),
            num_open_shards=len(open_shards),
            rows_in_progress=sum(len(rows) for rows in ledger.rows_in(open_shards).values()),
            attempts=attempts,
            refusal=None if is_old else refusal,
        )

    @property
    def rows_left(self) -> int | None:
        """Rows to do, estimated: a shard of unknown length counts as long as the average of the others.

        None if the length of no shard is known.
        """
        known = {shard.name: shard.num_rows for shard in self.run.shards if shard.num_rows is not None}
        known |= {summary.shard: summary.num_rows for summary in self.done.summaries}
        if not known:
            return None
        average = sum(known.values()) / len(known)
        rows = round(sum(known.get(name, average) for name in self.done.missing))
        return max(0, rows - self.rows_in_progress)

    @property
    def has_driver(self) -> bool:
        """Whether a driver works on the run, or on a slice of it; one without a heartbeat does not."""
        return driver_at_work(self.ledger.folder) is not None

    def lines(self) -> list[str]:
        done, open_shards = self.done, count(self.num_open_shards, "shard")
        lines = done.lines(is_over=not done.missing)
        if self.rows_in_progress:
            lines.append(f"in progress: {self.rows_in_progress:,} rows finished in {open_shards}")
        if done.missing:
            about = "" if self.rows_left is None else f"about {self.rows_left:,} rows, "
            lines.append(f"remaining: {about}{count(len(done.missing), 'shard')}")
        lines += attempt_lines(self.attempts)
        lines += [] if self.refusal is None else [str(self.refusal)]
        lines += _input_lines(self.ledger, self.run)
        return lines + _driver_lines(self.ledger, bool(done.missing))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`; programs read them, so their keys never change."""
        return {
            "output": str(self.ledger),
            "num_rows": self.done.num_rows,
            "by_status": dict(self.done.by_status),
            "num_shards": self.done.num_shards,
            "num_left": len(self.done.missing),
            "num_partial": len(self.done.partial),
            "rows_in_progress": self.rows_in_progress,
            "rows_left": self.rows_left,
            "rows_per_s": self.attempts.rows_per_s,
            "num_attempts": len(self.attempts),
            "refusal": None if self.refusal is None else str(self.refusal),
            "input": _input_lines(self.ledger, self.run),
            "drivers": [
                {"driver": str(holder), "slice": None if part is None else str(part), **holder.progress}
                for part, holder in self.ledger.drivers().items()
                if not holder.is_known_dead
            ],
        }


def _input_lines(ledger: Ledger, run: Run) -> list[str]:
    """Say what of the input is not read or has changed, if it can be listed without passwords and options."""
    if not run.inputs or (run.hides_options and any("://" in name for name in run.inputs)):
        return run.unread.lines()
    try:
        return ledger.compare_input(run).lines()
    except (InputError, OSError) as error:
        return [f"the input cannot be compared with that of the run: {error}"]


def _driver_lines(ledger: Ledger, is_unfinished: bool) -> list[str]:
    """Describe each driver that works on the run, or on a slice of it; or say that none does."""
    drivers = ledger.drivers()
    living = {part: holder for part, holder in drivers.items() if not holder.is_known_dead}
    if living:
        return [
            ("" if part is None else f"slice {part} ")
            + _driver_line(holder)
            + _silence(ledger.folder, lease_name(part))
            for part, holder in living.items()
        ]
    died = next((f"; {holder} has died" for holder in drivers.values()), "")
    if not is_unfinished:
        return [f"finished{died}"]
    return [f"no driver is running{died}; run the same command to resume"]


def _silence(folder: Folder, lease: str) -> str:
    """Say why a driver that lives sends no heartbeats: it cannot write them into an output that is full."""
    silent_s = folder.seconds_since_write(lease)
    if silent_s is None or silent_s < SILENT_AFTER_S:
        return ""
    try:
        folder.require_writable()
        reason = "the driver, its machine or the network has stopped"
    except ValueError as error:
        reason = str(error.__cause__)
    return f"; no heartbeat for {duration(silent_s)}: {reason}"


def _driver_line(holder: Holder) -> str:
    """Describe a driver that holds the output."""
    if not holder.progress:
        return f"running: {holder}, starting"
    end = _expected_end(holder.progress["left_s"])
    return f"running: {holder}: {ProgressSnapshot.from_dict(holder.progress).line()}{end}"


def _expected_end(left_s: float | None) -> str:
    if left_s is None:
        return ""
    return time.strftime(", ends about %Y-%m-%d %H:%M %Z", time.localtime(time.time() + left_s))
