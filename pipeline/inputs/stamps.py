"""Stamps: notice that a file is no longer what the run has listed.

A stamp is the size of a file and the time of its last change. Rows are joined by their number, so a file that
was made again must not be mixed with rows of the file before it. A file that was only copied has another time
and the same content, which a digest of a sample of its bytes shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import InputError
from pipeline.inputs.formats import read_shard
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import Shard, is_local
from pipeline.storage.file_table import UNKNOWN, ListedFile
from pipeline.storage.filesystems import at_once, join, open_filesystem
from pipeline.storage.retrying import retry_on_oserror
from pipeline.storage.retrying_file import READ_FOR_S, open_below
from pipeline.storage.secrets import without_secrets

STAMPED_AT_ONCE = 64
"""Files whose stamps one task of a thread reads; a task costs more than a stamp."""
NUM_SAMPLES = 16
SAMPLE_BYTES = 16 << 10
"""The digest covers this much at equal distances, from the first byte to the last."""


def stamp_of(info: pafs.FileInfo) -> str:
    """Return the stamp of a file in a store.

    Stores give whole seconds in one answer and fractions in another, so fractions are left out. A web server
    may not give the time, which is then empty, or the size; then the stamp is unknown.
    """
    if info.type != pafs.FileType.File or info.size is None:
        return UNKNOWN
    return f"{info.size}@{'' if info.mtime_ns is None else info.mtime_ns // 10**9}"


def local_stamp(path: str) -> str:
    """Return the stamp of a file on a disk."""
    try:
        status = os.stat(path)
    except OSError:
        return UNKNOWN
    return f"{status.st_size}@{status.st_mtime_ns}"


def local_stamps(paths: Sequence[str]) -> list[str]:
    """Return the stamps of files on a disk, which may be a network disk that answers slowly."""
    starts = range(0, len(paths), STAMPED_AT_ONCE)
    parts = at_once(lambda start: list(map(local_stamp, paths[start : start + STAMPED_AT_ONCE])), starts)
    return list(chain.from_iterable(parts))


def stamps_now(root: str, entries: Sequence[tuple[str, ListedFile]]) -> tuple[str, ...]:
    """Return the stamps of files: those in the listing of a store, or those that the disk has now."""
    if is_local(root):
        return tuple(local_stamps([join(root, file) for file, _ in entries]))
    return tuple(listed.stamp for _, listed in entries)


def local_stamps_by_path(shards: Iterable[Shard]) -> dict[str, str]:
    """Return the stamps that the local files of shards have now, all read at once."""
    paths: dict[str, None] = {}
    for shard in shards:
        if is_local(shard.root):
            paths.update(dict.fromkeys(path_of(shard.root, file) for file in shard.files))
    return dict(zip(paths, local_stamps(list(paths)), strict=True))


def path_of(root: str, file: str) -> str:
    """Return the path of a file below a root, without secrets."""
    return join(without_secrets(root), file)


def size_in(stamp: str) -> str:
    """Return the size in a stamp."""
    return stamp.partition("@")[0]


def may_be_same(known: str, now: str) -> bool:
    """Return whether a file with the stamp `now` may be the one that had the stamp `known`."""
    if known == now or UNKNOWN in (known, now):
        return True
    return size_in(known) == size_in(now) and (known.endswith("@") or now.endswith("@"))


def merged(known: str, now: str) -> str:
    """Return the stamp that a file has now, or the known one if that says more."""
    return known if now == UNKNOWN or (now.endswith("@") and size_in(now) == size_in(known)) else now


def read_unchanged(work: ShardWork, options: ReadOptions, kept: pa.Schema | None = None) -> Tables:
    """Read a shard, and report it as changed if its file differs from the listed one before or after.

    The arguments are those of `read_shard`.
    A slice of a folder is not checked: each of its rows is one file, and its key is the file's name.
    """
    shard = work.shard
    if shard.format == "folder":
        report = yield from read_shard(work, options, kept)
        return replace(report, generation=shard.generation)
    content = None
    try:
        content = sample_digest(shard)
    except (InputError, OSError, pa.ArrowException):
        pass  # Reading the shard says what is wrong.
    if _is_listed(shard) is False:  # After the digest, which could otherwise be that of a newer file.
        return _changed(shard, "has changed since the run has listed it")
    report = yield from read_shard(work, options, kept)
    is_listed = _is_listed(shard, READ_FOR_S if report.complete else 0.0)
    if is_listed is False and not has_content(shard, content):
        return _changed(shard, "has changed while it was read")
    if is_listed is None and report.complete:
        reason = f"the store does not tell whether {shard.uri} has changed while it was read"
        report = replace(report, complete=False, reason=reason)
    return replace(report, generation=shard.generation, content=content)


def has_content(shard: Shard, content: str | None) -> bool:
    """Return whether the file of a shard has the bytes that the digest stands for; False if unknown."""
    try:
        return content is not None and sample_digest(shard) == content
    except (InputError, OSError, pa.ArrowException):
        return False


def sample_digest(shard: Shard) -> str:
    """Return a digest of the size of a shard's only file and of a sample of its bytes."""
    with open_below(shard.root, shard.files[0]) as file:
        size = file.size()
        digest = hashlib.sha256(str(size).encode())
        last = max(0, size - SAMPLE_BYTES)
        for start in sorted({last * number // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES) or b"")
    return digest.hexdigest()[:32]


def _is_listed(shard: Shard, retry_for_s: float = 0.0) -> bool | None:
    """Return whether the file of a shard may have the stamp of the listing; None if the store fails."""
    known = shard.stamps[0] if shard.stamps else UNKNOWN
    if known == UNKNOWN:
        return True
    try:
        filesystem, root = open_filesystem(shard.root)
        path = join(root, shard.files[0])
        if isinstance(filesystem, pafs.LocalFileSystem):
            return may_be_same(known, local_stamp(path))
        (info,) = retry_on_oserror(lambda: filesystem.get_file_info([path]), retry_for_s, "input")
    except (InputError, OSError, pa.ArrowException):
        return None
    return may_be_same(known, stamp_of(info))


def _changed(shard: Shard, how: str) -> ShardReport:
    return ShardReport(
        shard=shard.name,
        num_rows=0,
        complete=False,
        reason=f"{shard.uri} {how}; --redo-changed makes its rows again",
        changed=True,
        generation=shard.generation,
    )
