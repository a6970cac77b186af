"""Names of the files in an output folder; `ledger` says what they are. They never change."""

from __future__ import annotations

import re

from pipeline.inputs.shards import RunSlice

STATE = "_blip2"
RUN_FILE = f"{STATE}/run.json"
SHARD_LIST = f"{STATE}/shards.jsonl.gz"
"""The list of shards, except of a run that slices have begun; see `slices_shard_list`."""
FRAGMENTS = f"{STATE}/fragments"
ROWS = ".rows"
"""Ending of the folder that holds the fragments and the report of an unfinished shard."""
OLD_SHARD_REPORTS = f"{STATE}/ends"
"""Where version 0.1.0 kept shard reports."""
LEASE = f"{STATE}/lease.json"
SLICE_LEASES = f"{STATE}/leases"
"""The folder with the leases of drivers that work on a slice of the run."""
SUMMARIES = f"{STATE}/summaries"
ATTEMPTS = f"{STATE}/attempts"
"""Records of what each start of the run did; a resume does not need them."""
LOGS = f"{STATE}/log"
"""What the driver of each attempt printed, as lines of JSON."""
REFUSAL = f"{STATE}/refused.json"
"""Why a submitted job was last refused here; it claims nothing, and a resume does not need it."""
PLAN_FOLDERS = f"{STATE}/plan-"
"""Prefix of the folders in which `plan` times writing."""
_SLICE_LEASE = re.compile(r"/(\d+)-of-(\d+)\.json$")
_SLICES_SHARD_LIST = re.compile(rf"{STATE}/shards-[0-9a-f]+\.jsonl\.gz")
_GENERATION = re.compile(r"~again(\d+)$")
SUFFIX = ".parquet"
"""Ending of finished shards; no file of the state may have it, or globs would find that file."""


def output_name(shard: str) -> str:
    """Return the name of a shard's file."""
    return shard + SUFFIX


def is_result(name: str) -> bool:
    """Return whether a file of the output is the file of a finished shard."""
    return name.endswith(SUFFIX) and not name.startswith(f"{STATE}/")


def state_name(shard: str, generation: int) -> str:
    """Return the name under which the state keeps the results of one generation of a shard."""
    return f"{shard}~again{generation}" if generation else shard


def parse_state_name(name: str) -> tuple[str, int]:
    """Return the shard and the generation that `state_name` joined."""
    match = _GENERATION.search(name)
    return (name[: match.start()], int(match[1])) if match else (name, 0)


def slices_shard_list(run_id: str) -> str:
    """Return the name of the list of shards of a run that slices begin.

    Drivers of several slices may begin one at the same moment: none may replace the list of another.
    """
    return f"{STATE}/shards-{run_id}.jsonl.gz"


def is_shard_list(name: str) -> bool:
    """Return whether a file is a list of shards: of this run, or of one whose driver died as it began."""
    return name == SHARD_LIST or _SLICES_SHARD_LIST.fullmatch(name) is not None


def lease_name(run_slice: RunSlice | None) -> str:
    """Return the name of the lease of a driver for a whole run, or for a slice of it."""
    return LEASE if run_slice is None else f"{SLICE_LEASES}/{run_slice.number}-of-{run_slice.total}.json"


def parse_lease_name(name: str) -> RunSlice | None:
    """Return the slice that a lease is for, or None for a whole run."""
    match = _SLICE_LEASE.search(name)
    return None if match is None else RunSlice(int(match[1]), int(match[2]))


def folder_of_shard(shard: str, generation: int) -> str:
    """Return the name of the folder with all files of an unfinished shard."""
    return f"{FRAGMENTS}/{state_name(shard, generation)}{ROWS}"


def parse_folder_of_shard(folder: str) -> tuple[str, int] | None:
    """Return the shard and the generation of a folder, or None if it belongs to no shard."""
    if not (folder.startswith(f"{FRAGMENTS}/") and folder.endswith(ROWS)):
        return None
    return parse_state_name(folder[len(FRAGMENTS) + 1 : -len(ROWS)])


def shard_report_name(shard: str, generation: int, changed: bool = False) -> str:
    """Return the name of a shard's report.

    Args:
        changed: whether the report says that the input has changed; a listing then shows it.
    """
    return f"{folder_of_shard(shard, generation)}/{'changed' if changed else 'report'}.json"


def is_report_of_change(name: str) -> bool:
    """Return whether a report file says that the input of its shard has changed."""
    return name.endswith("/changed.json")


def parse_shard_report_name(name: str) -> tuple[str, int] | None:
    """Return the shard and the generation of a report file, or None if it is not a report."""
    if name.startswith(f"{OLD_SHARD_REPORTS}/"):
        return parse_state_name(name.removeprefix(f"{OLD_SHARD_REPORTS}/").removesuffix(".json"))
    folder, _, last = name.rpartition("/")
    return parse_folder_of_shard(folder) if last in ("report.json", "changed.json") else None
