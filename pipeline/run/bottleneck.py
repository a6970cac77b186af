"""The bottleneck: which stage limited the speed of the run, and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.attempts.attempt import STAGES, WorkerLoad

BUSY = 0.7
"""A stage is the bottleneck from this busy fraction on."""
REMEDIES = {
    "caption": "more captioning actors (--max-actors) or a faster device would help",
    "decode": "more decoding actors (--max-decode-actors, more CPUs) or --image-jpeg-draft would help",
    "write": "a faster store for the output would help",
    "read": "a faster store for the input, or more and smaller shards, would help",
}


def busy_fractions(loads: Mapping[str, Mapping[str, WorkerLoad]]) -> dict[str, float]:
    """Return the busy fraction of each stage: busy seconds over alive seconds of all its workers together."""
    fractions = {}
    for stage in STAGES:
        workers = loads.get(stage, {}).values()
        alive_s = sum(load.alive_s for load in workers)
        if alive_s:
            fractions[stage] = min(1.0, sum(load.busy_s for load in workers) / alive_s)
    return fractions


def describe_bottleneck(busy: Mapping[str, float]) -> str:
    """Return one sentence. Reading is not measured: it is the bottleneck when no other stage is busy."""
    if not busy:
        return "bottleneck: none, there was nothing to do"
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < BUSY:
        shown = ", ".join(f"{name} {part:.0%}" for name, part in busy.items())
        return f"bottleneck: reading or start-up, no later stage was busy ({shown}); {REMEDIES['read']}"
    return f"bottleneck: {stage}, busy {busy[stage]:.0%} of the time; {REMEDIES[stage]}"
