"""The command `blip2 verify`: read an output back whole, and say what is wrong with it and what to do.

Every file is read, also while a driver works on the output. Nothing is written. The command needs no Ray and
no model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.finding import Finding
from pipeline.inputs.changes import name_some
from pipeline.ledger.commit import Summary
from pipeline.ledger.lease import driver_at_work
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.maintenance.endpoint import compare_with_endpoint, connect
from pipeline.maintenance.input_files import check_input
from pipeline.maintenance.settings import VerifySettings
from pipeline.maintenance.shard_file import check_shard_file
from pipeline.maintenance.state_files import check_fragments, check_leftovers, check_strays
from pipeline.progress import LOG_EVERY_S, Console, count, write_json
from pipeline.storage.folder import Folder
from pipeline.storage.secrets import hide_secrets

NUM_FILES_AT_ONCE = 8
"""Files that are read at the same time; one row group of each is in memory."""


@errors_to_exit_status
def verify(settings: VerifySettings) -> int:
    """Print what is in an output, and each fault with its remedy; exit with 1 if there is one."""
    console = Console()
    with before_work(type(settings)):
        ledger = Ledger(Folder(settings.output))
        run = ledger.require_run(settings.input)
        endpoint = None if settings.url is None else connect(settings.url, settings.key_file, run)
    findings: list[Finding] = []
    summaries: dict[str, Summary] = {}
    found = examine(ledger.of(run), run, settings, summaries, console)
    if endpoint is not None:
        captions = compare_with_endpoint(endpoint, ledger.folder, run, summaries, settings.sample)
        found = chain(found, captions)
    for finding in found:
        findings.append(finding)
        if not settings.json:
            console.finding(finding)
    left = tuple(shard.name for shard in run.shards if shard.name not in summaries)
    done = Reconciliation(len(run.shards), tuple(summaries.values()), left)
    if settings.json:
        write_json(json.dumps(_document(ledger, done, findings), indent=1))
    else:
        for line in [*done.lines(is_over=not left), _verdict(ledger, done, findings)]:
            console.result(hide_secrets(line))
    return ExitStatus.FAILED if _num_faults(findings) else ExitStatus.DONE


def examine(
    ledger: Ledger, run: Run, settings: VerifySettings, summaries: dict[str, Summary], console: Console
) -> Iterator[Finding]:
    """Yield what is wrong with an output, or must be known of it.

    Args:
        summaries: filled with what the footer of each readable file says, by shard.
        console: says how many files have been read, unless the findings are printed as JSON.
    """
    folder, state = ledger.folder, ledger.scan()
    holder = driver_at_work(folder)
    if holder is not None:
        yield Finding("run", "warn", f"is at work: {holder}", "verify again when it has ended")
    shards = [shard for shard in run.shards if shard.name in state.finished]
    told = time.monotonic()
    with ThreadPoolExecutor(NUM_FILES_AT_ONCE) as pool:
        checked = pool.map(lambda shard: check_shard_file(folder, run, shard), shards)
        for number, (summary, fault) in enumerate(checked, 1):
            if fault is not None:
                yield fault
            if summary is not None:
                summaries[summary.shard] = summary
            if not settings.json and time.monotonic() - told >= LOG_EVERY_S:
                told = time.monotonic()
                console.say(f"{number:,} of {count(len(shards), 'file')} read")
    left = [shard.name for shard in run.shards if shard.name not in state.finished]
    if left:
        yield Finding(
            "run",
            "fail" if holder is None else "warn",
            f"{count(len(left), 'shard')} of {len(run.shards):,} have no file: {name_some(left)}",
            "run the same command again, which makes what is missing",
        )
    yield from check_fragments(folder, run, state)
    yield from check_strays(folder.names(), run)
    if holder is None:  # Files of a driver at work are no leftovers.
        yield from check_leftovers(folder, run, state, summaries)
    yield from check_input(ledger, run, settings.input, summaries)


def _num_faults(findings: list[Finding]) -> int:
    return sum(finding.verdict == "fail" for finding in findings)


def _verdict(ledger: Ledger, done: Reconciliation, findings: list[Finding]) -> str:
    faults = _num_faults(findings)
    read = f"{count(len(done.summaries), 'file')} of {ledger} read"
    return f"{read}: {count(faults, 'fault') if faults else 'no fault'}"


def _document(ledger: Ledger, done: Reconciliation, findings: list[Finding]) -> dict[str, Any]:
    return {
        "output": str(ledger),
        "num_shards": done.num_shards,
        "num_left": len(done.missing),
        "num_partial": len(done.partial),
        "num_rows": done.num_rows,
        "by_status": dict(done.by_status),
        "num_faults": _num_faults(findings),
        "findings": [finding.to_dict() for finding in findings],
    }
