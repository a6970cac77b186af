"""Check the files of an output that are not those of finished shards: fragments, leftovers and strays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pipeline.finding import Finding
from pipeline.inputs.changes import name_some
from pipeline.ledger.commit import Summary
from pipeline.ledger.fragments import Fragment, is_intact
from pipeline.ledger.layout import STATE, is_result, output_name
from pipeline.ledger.lease import read_holders
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState
from pipeline.maintenance.removable import find_removable
from pipeline.progress import count
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder


def check_strays(names: Iterable[str], run: Run) -> Iterator[Finding]:
    """Yield the files next to the results that are no results; names with `_` or `.` in front are hidden."""
    known = {output_name(shard.name) for shard in run.shards}
    strays = [name for name in names if name not in known and not name.startswith(f"{STATE}/")]
    others = []
    for name in sorted(strays):
        if is_result(name):
            yield Finding(
                name,
                "fail",
                "belongs to no shard of the run, and is read with the results by whatever reads the folder",
                "move it to another folder",
            )
        elif not any(part.startswith(("_", ".")) for part in name.split("/")):
            others.append(name)
    if others:
        yield Finding(
            "other files",
            "warn",
            f"{count(len(others), 'file')} of no run: {name_some(others)}",
            "move them to another folder if a program that reads the whole folder refuses them",
        )


def check_fragments(folder: Folder, run: Run, state: OutputState) -> Iterator[Finding]:
    """Read the fragments of the listed shards; yield those whose content is not what was written."""
    listed = {shard.name for shard in run.shards}
    fragments = [f for shard, found in state.fragments.items() if shard in listed for f in found]
    yield from filter(None, at_once(lambda fragment: _damage(folder, fragment), fragments))


def _damage(folder: Folder, fragment: Fragment) -> Finding | None:
    content = folder.get(fragment.name)
    if content is None or is_intact(fragment.name, content):
        return None
    return Finding(
        fragment.name,
        "fail",
        "is damaged: its content is not what was written",
        f"delete {fragment.name} and run the same command again, which makes its rows again",
    )


def check_leftovers(
    folder: Folder, run: Run, state: OutputState, summaries: Mapping[str, Summary]
) -> Iterator[Finding]:
    """Yield what dead processes have left behind. It does no harm."""
    found = find_removable(run, state, summaries, read_holders(folder))
    for reason, names in found.by_reason.items():
        yield Finding(
            "leftovers",
            "warn",
            f"{count(len(names), 'file')} of no use: {reason}",
            "blip2 clean lists and deletes them, and so does the next start of the run",
        )
    if found.waiting:
        yield Finding(
            "leftovers",
            "warn",
            f"{count(sum(found.waiting.values()), 'fragment')} of a retry that was stopped, in "
            f"{count(len(found.waiting), 'shard')}",
            "run blip2 retry again to go on with it",
        )
