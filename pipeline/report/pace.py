"""How fast a run was, from the records of its attempts. Times of files say nothing: a copy has new ones."""

from __future__ import annotations

from datetime import timedelta

from pipeline.attempts.attempt import Attempt, Attempts
from pipeline.progress import count, duration
from pipeline.run.bottleneck import TOO_SHORT, Machines, describe_bottleneck

UNKNOWN = "speed: unknown, the output has no record of what its attempts did"
MAX_WARNINGS = 5


def attempt_lines(attempts: Attempts) -> list[str]:
    """Return the speed of a run, how its last attempt ended, and what its workers quantized and warned of."""
    if not attempts.all:
        return [UNKNOWN]
    lines = [_speed(attempts)]
    if attempts.rows:
        lines.append(verdict(attempts))
    lines.append(f"{_span(attempts)}; the last: {attempts.all[-1].ending}")
    quantization = attempts.quantization.most_common(MAX_WARNINGS)
    lines += [f"quantized by {count(n, 'worker')}: {text}" for text, n in quantization]
    warnings = attempts.warnings.most_common()
    lines += [f"worker warning, at least {count(n, 'time')}: {text}" for text, n in warnings[:MAX_WARNINGS]]
    if len(warnings) > MAX_WARNINGS:
        lines.append(f"... and {len(warnings) - MAX_WARNINGS:,} more warnings of workers")
    return lines


def total_line(attempts: Attempts) -> str:
    """Return what all attempts of a run have done together, and when the first began and the last ended."""
    rate = f" ({attempts.rows_per_s:,.1f} rows/s)" if attempts.rows_per_s else ""
    return f"{_span(attempts)}: {count(attempts.rows, 'row')} in {duration(attempts.active_s)} of work{rate}"


def _span(attempts: Attempts) -> str:
    first, last = attempts.all[0], attempts.all[-1]
    return f"{count(len(attempts), 'attempt')}, {time_of(first)} to {time_of(last, last_s(last))}"


def verdict(attempts: Attempts) -> str:
    """Return the bottleneck of a run, as far as the records of its attempts tell it."""
    longest = attempts.longest
    if longest is None or not attempts.rows:
        return TOO_SHORT
    machines = Machines(
        num_cpus=longest.hardware.get("cpus", 0.0),
        num_accelerators=longest.hardware.get("accelerators", 0.0),
        num_workers=longest.workers,
    )
    return describe_bottleneck(attempts.busy_fractions, attempts.active_s, machines)


def time_of(attempt: Attempt, seconds: float = 0.0) -> str:
    """Return the time some seconds after the start of an attempt, in UTC."""
    return f"{attempt.begun_at + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S} UTC"


def last_s(attempt: Attempt) -> float:
    """Return the seconds from the start of an attempt to the last that is known of it."""
    if attempt.ended_s is not None:
        return attempt.ended_s
    return attempt.points[-1].seconds if attempt.points else 0.0


def _speed(attempts: Attempts) -> str:
    rate = attempts.rows_per_s
    if rate is None:
        return "speed: unknown, no attempt has recorded a finished row"
    work = f"{count(attempts.rows, 'row')} in {duration(attempts.active_s)} of work"
    return f"speed: {rate:,.1f} rows/s, {work}, start-up and pauses left out"
