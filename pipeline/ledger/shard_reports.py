"""Shard reports: how reading a shard ended, and so how many rows it has.

The worker that reads a shard stores its report; the commit of the shard deletes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.layout import SHARD_REPORTS, shard_of_report, shard_report_name
from pipeline.storage.folder import Folder


def store_shard_report(folder: Folder, report: ShardReport) -> None:
    """Store the report of a shard; safe to call twice, as Ray may read a shard again.

    A report that could read less does not replace one that could read more: rows that were there once count.
    """
    if not report.complete:
        known = load_shard_report(folder, report.shard)
        if known is not None and (known.complete or known.num_rows > report.num_rows):
            return
    folder.put(shard_report_name(report.shard), json.dumps(asdict(report)).encode())


def load_shard_report(folder: Folder, shard: str) -> ShardReport | None:
    """Return the stored report of a shard, or None when there is none."""
    content = folder.get(shard_report_name(shard))
    return ShardReport(**json.loads(content)) if content else None


def shards_with_a_report(folder: Folder) -> set[str]:
    return {shard_of_report(name) for name in folder.names(SHARD_REPORTS)}
