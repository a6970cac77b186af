"""Names of the files in an output folder; `ledger` says what they mean. They never change."""

from __future__ import annotations

STATE = "_blip2"
RUN_FILE = f"{STATE}/run.json"
SHARD_LIST = f"{STATE}/shards.jsonl.gz"
SHARD_REPORTS = f"{STATE}/ends"
FRAGMENTS = f"{STATE}/fragments"
LEASE = f"{STATE}/lease.json"
PLAN_FOLDERS = f"{STATE}/plan-"
"""Begins the names of the folders in which `plan` times writing."""
SUFFIX = ".parquet"
"""Ends the names of finished shards; no name of the state may, or globs would find it."""


def output_name(shard: str) -> str:
    """Return the name of a shard's file."""
    return shard + SUFFIX


def is_result(name: str) -> bool:
    """Return whether a file of the output is the file of a finished shard."""
    return name.endswith(SUFFIX) and not name.startswith(f"{STATE}/")


def shard_report_name(shard: str) -> str:
    return f"{SHARD_REPORTS}/{shard}.json"


def shard_of_report(name: str) -> str:
    """Return the shard that a report file is about."""
    return name.removeprefix(f"{SHARD_REPORTS}/").removesuffix(".json")
