"""Which files of an output are no longer needed, and why; results and the record of a run always are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from pipeline.ledger.commit import Summary
from pipeline.ledger.layout import FRAGMENTS, OLD_SHARD_REPORTS, PLAN_FOLDERS, is_result
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState


@dataclass(frozen=True)
class Removable:
    """Files of no use, by the reason."""

    by_reason: Mapping[str, tuple[str, ...]]
    waiting: Mapping[str, int]
    """Numbers of fragments by finished shard that a `retry` which was stopped goes on with."""

    @property
    def names(self) -> list[str]:
        return list(chain.from_iterable(self.by_reason.values()))


def find_removable(
    run: Run | None, state: OutputState, summaries: Mapping[str, Summary], dead_leases: Iterable[str]
) -> Removable:
    """Sort the state files of an output.

    Args:
        run: the run in the output; None if there is none, and then only temporary files and lists of
            shards are of no use.
        summaries: of the finished shards that have fragments. A shard without one keeps them.
        dead_leases: names of the leases of drivers that have died.
    """
    of_state = (FRAGMENTS, OLD_SHARD_REPORTS)
    outdated = [name for name in state.leftovers if name.startswith(of_state) or is_result(name)]
    plans = [name for name in state.leftovers if name.startswith(PLAN_FOLDERS)]
    others = {*outdated, *plans}
    temporary = [name for name in state.leftovers if name not in others]
    merged: list[str] = []
    waiting: dict[str, int] = {}
    if run is None:
        outdated = []
    else:
        listed = {shard.name for shard in run.shards}
        outdated += [name for shard, name in state.shard_reports.items() if shard not in listed]
        for shard, fragments in state.fragments.items():
            names = [fragment.name for fragment in fragments]
            summary = summaries.get(shard)
            if shard not in listed:
                outdated += names
            elif summary is None:
                continue
            elif summary.complete and not summary.num_failed:
                merged += names
            else:
                waiting[shard] = len(names)
    by_reason: dict[str, Iterable[str]] = {
        "temporary files of processes that have died": temporary,
        "files of plans that were killed": plans,
        "lists of shards of runs that were never begun": state.unread_lists(run),
        "rows of shards that were begun again": outdated,
        "rows that are also in the files of finished shards": merged,
        "leases of drivers that have died": dead_leases,
    }
    sorted_names = {reason: tuple(sorted(names)) for reason, names in by_reason.items()}
    return Removable({reason: names for reason, names in sorted_names.items() if names}, waiting)
