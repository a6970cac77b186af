"""Scan an output folder: list it once, and sort what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.ledger.fragments import Fragment, parse_fragment
from pipeline.ledger.layout import (
    FRAGMENTS,
    PLAN_FOLDERS,
    SHARD_REPORTS,
    SUFFIX,
    is_result,
    parse_shard_report_name,
)
from pipeline.storage.folder import ASIDE, PROBE, Folder


@dataclass(frozen=True)
class OutputState:
    """What one listing of the output shows."""

    finished: frozenset[str]
    """Shards that have their file."""
    fragments: Mapping[str, Sequence[Fragment]]
    """Fragments by shard."""
    shard_reports: frozenset[str]
    """Shards that were read to their end and are not committed."""
    leftovers: tuple[str, ...]
    """Half-written files of drivers and workers that died, the files of a `plan` that was killed, and what
    was made of a shard's content before the shard was begun again."""


def scan_output(folder: Folder, generations: Mapping[str, int] | None = None) -> OutputState:
    """List the output once, and sort its files.

    Args:
        generations: of the shards that were begun again; all others have generation 0.
    """
    generations = generations or {}
    finished, shard_reports, leftovers = set(), set(), []
    fragments: dict[str, list[Fragment]] = {}
    for name in folder.names():
        if name.startswith(f"{FRAGMENTS}/"):
            fragment = parse_fragment(name)
            if fragment is None:
                continue
            if fragment.generation != generations.get(fragment.shard, 0):
                leftovers.append(name)
            else:
                fragments.setdefault(fragment.shard, []).append(fragment)
        elif name.startswith(f"{SHARD_REPORTS}/"):
            shard, generation = parse_shard_report_name(name)
            if generation != generations.get(shard, 0):
                leftovers.append(name)
            else:
                shard_reports.add(shard)
        elif name.startswith((f"{ASIDE}/", PLAN_FOLDERS, PROBE)):
            leftovers.append(name)
        elif is_result(name):
            finished.add(name.removesuffix(SUFFIX))
    return OutputState(frozenset(finished), fragments, frozenset(shard_reports), tuple(leftovers))
