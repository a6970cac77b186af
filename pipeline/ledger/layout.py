"""Names of the files in an output folder; `ledger` says what they mean. They never change."""

from __future__ import annotations

import re

STATE = "_blip2"
RUN_FILE = f"{STATE}/run.json"
SHARD_LIST = f"{STATE}/shards.jsonl.gz"
SHARD_REPORTS = f"{STATE}/ends"
FRAGMENTS = f"{STATE}/fragments"
LEASE = f"{STATE}/lease.json"
ATTEMPTS = f"{STATE}/attempts"
"""Records of what each start of the run did; nothing that a resume needs."""
PLAN_FOLDERS = f"{STATE}/plan-"
"""Begins the names of the folders in which `plan` times writing."""
_GENERATION = re.compile(r"~again(\d+)$")
SUFFIX = ".parquet"
"""Ends the names of finished shards; no name of the state may, or globs would find it."""


def output_name(shard: str) -> str:
    """Return the name of a shard's file."""
    return shard + SUFFIX


def is_result(name: str) -> bool:
    """Return whether a file of the output is the file of a finished shard."""
    return name.endswith(SUFFIX) and not name.startswith(f"{STATE}/")


def state_name(shard: str, generation: int) -> str:
    """Return the name under which the state keeps what was made of one content of a shard."""
    return f"{shard}~again{generation}" if generation else shard


def parse_state_name(name: str) -> tuple[str, int]:
    """Return the shard and the generation that `state_name` has joined."""
    match = _GENERATION.search(name)
    return (name[: match.start()], int(match[1])) if match else (name, 0)


def shard_report_name(shard: str, generation: int = 0) -> str:
    return f"{SHARD_REPORTS}/{state_name(shard, generation)}.json"


def parse_shard_report_name(name: str) -> tuple[str, int]:
    """Return the shard that a report file is about, and the generation."""
    return parse_state_name(name.removeprefix(f"{SHARD_REPORTS}/").removesuffix(".json"))
