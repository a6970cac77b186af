"""Summaries of finished shards, kept a thousand to a file, so that not every finished file must be opened.

The footer of a shard's file has the same summary, and decides. A kept summary counts as long as the file has
the size and the time of writing that it states. A commit does not know that time; its summary counts unless
the file was written after it.
"""

from __future__ import annotations

import gzip
import json
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, replace
from gzip import BadGzipFile
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.caption_counts import CaptionCounts
from pipeline.ledger.commit import Summary, read_summary
from pipeline.ledger.layout import SUMMARIES
from pipeline.ledger.scan import OutputState
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder, WrittenFile

SUMMARIES_PER_FILE = 1000
MAX_SPARE_FILES = 8
"""With more spare files of summaries than this, all are written again."""


def keep_summaries(folder: Folder, summaries: Iterable[Summary]) -> list[str]:
    """Store summaries of shards whose files have just been written; return the names of the new files.

    Args:
        summaries: as `commit_shard` has returned them.
    """
    rest, names = iter(summaries), []
    while some := list(islice(rest, SUMMARIES_PER_FILE)):
        content = json.dumps([asdict(summary) for summary in some], separators=(",", ":")).encode()
        names.append(f"{SUMMARIES}/{uuid.uuid4().hex}.json.gz")
        folder.put(names[-1], gzip.compress(content, compresslevel=3))
    return names


def load_summaries(
    folder: Folder, state: OutputState, shards: Sequence[str]
) -> tuple[list[Summary], frozenset[str]]:
    """Return the summaries of finished shards; those that were not kept are read from the footers.

    Args:
        state: a listing of the output.
        shards: names of finished shards.

    Returns:
        The summaries in the order of the shards, and the names of the shards whose summaries were not kept.
    """
    kept = _load_kept(folder, state)
    unknown = [shard for shard in shards if shard not in kept]
    read = at_once(lambda shard: read_summary(folder, shard), unknown)
    kept |= {
        shard: _of_file(summary, state.written[shard])  # a file under a foreign name tells of another shard
        for shard, summary in zip(unknown, read, strict=True)
    }
    return [kept[shard] for shard in shards], frozenset(unknown)


def without_outdated(folder: Folder, state: OutputState, generations: Mapping[str, int]) -> OutputState:
    """Return the state without files of earlier generations of shards, which are leftovers.

    A driver that goes on after it was suspended may have written them.

    Args:
        generations: of the shards that were begun again.
    """
    again = [shard for shard in generations if shard in state.finished]
    kept = _load_kept(folder, state) if again else {}

    def is_outdated(shard: str) -> bool:
        try:
            summary = kept.get(shard) or read_summary(folder, shard)
        except (OSError, pa.ArrowException, ValueError, TypeError, KeyError):
            return False  # `verify` says what is wrong with a file that cannot be read.
        return summary.generation < generations[shard]

    outdated = [shard for shard, found in zip(again, at_once(is_outdated, again), strict=True) if found]
    return replace(
        state.without(outdated), leftovers=(*state.leftovers, *(state.written[s].name for s in outdated))
    )


def tidy_summaries(
    folder: Folder, state: OutputState, summaries: Sequence[Summary], unkept: Set[str]
) -> None:
    """Keep the summaries of a run that are not kept yet; write all again if they are in too many files.

    Args:
        state: the listing for which the summaries were loaded.
        summaries: of all finished shards.
        unkept: the shards whose summaries are in no file yet.
    """
    num_needed = -(-len(summaries) // SUMMARIES_PER_FILE)
    num_files = len(state.summaries) + -(-len(unkept) // SUMMARIES_PER_FILE)
    is_full = num_files > num_needed + MAX_SPARE_FILES
    to_keep = summaries if is_full else [summary for summary in summaries if summary.shard in unkept]
    keep_summaries(folder, (_of_file(summary, state.written[summary.shard]) for summary in to_keep))
    if is_full:
        folder.delete_files([file.name for file in state.summaries])


def _load_kept(folder: Folder, state: OutputState) -> dict[str, Summary]:
    """Return the kept summaries that still say what the files of their shards hold."""
    files = sorted(state.summaries, key=lambda file: file.written)
    contents = at_once(lambda file: folder.get(file.name), files)
    kept: dict[str, Summary] = {}
    for file, content in zip(files, contents, strict=True):
        for values in _unpack(content):
            shard = state.written.get(values["shard"])
            if shard is not None and _is_current(values, file, shard):
                kept[values["shard"]] = _parse(values)
    return kept


def _unpack(content: bytes | None) -> list[dict[str, Any]]:
    """Return the summaries in a file; none if it is gone or damaged, because the footers have the same."""
    try:
        return json.loads(gzip.decompress(content)) if content else []
    except (BadGzipFile, EOFError, zlib.error, ValueError):
        return []


def _is_current(values: Mapping[str, Any], kept_in: WrittenFile, shard: WrittenFile) -> bool:
    if values["num_bytes"] != shard.num_bytes:
        return False
    written: float | None = values["written"]
    return shard.written <= kept_in.written if written is None else shard.written == written


def _of_file(summary: Summary, file: WrittenFile) -> Summary:
    return replace(summary, num_bytes=file.num_bytes, written=file.written)


def _parse(values: dict[str, Any]) -> Summary:
    captions = CaptionCounts(**values.pop("captions"))
    return Summary(**values, captions=captions)
