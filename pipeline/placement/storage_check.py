"""Check input and output from the nodes, before an accelerator is requested.

A path that the driver sees need not exist on other nodes, or may be another disk there. Its images would be
captioned and lost, or count as shards without rows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import InputError, RefusedByCluster
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.shards import Shard
from pipeline.placement.cluster import Cluster, num_fitting
from pipeline.placement.reservations import Reservation
from pipeline.storage.folder import PROBE, Folder
from pipeline.storage.retrying_file import open_below
from pipeline.watch.waiting import Say, wait_for

MAX_SAMPLE = 8
"""Files of the input that each node opens."""
MAX_NODES = 16
"""Maximum number of nodes that check; the nodes of a cluster are alike."""
REMEDY = "give a URI such as s3:// or gs://, or a folder that is mounted on every node"
ANSWER_S = 60.0
"""How long all nodes together may take; one that does not answer is lost, and is not asked again."""


@dataclass(frozen=True)
class StorageReport:
    """What one node sees of the storage."""

    node: str
    output: str | None
    """What is wrong with the output; None if nothing is."""
    input: str | None
    """Why no file of the sample can be opened; None if one can."""


SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""An environment variable that Ray sets for the command of a submitted job, by this very name."""


def refuse_relative(name: str, places: Sequence[str]) -> None:
    """Raise ValueError if a submitted job names a path that is relative to its working folder.

    Args:
        name: name of the setting.
        places: paths and URIs.
    """
    if SUBMITTED not in os.environ:
        return
    for place in places:
        if "://" not in place and not os.path.isabs(place):
            raise ValueError(
                f"{name} must be a URI or an absolute path in a submitted job, got {place}: the job runs in "
                f"{os.getcwd()} on a node of the cluster, which other nodes do not share and Ray deletes; "
                "give a URI such as s3:// or gs://, or an absolute path that is mounted on every node"
            )


def check_storage(
    folder: Folder, shards: Sequence[Shard], cluster: Cluster, read: Reservation, say: Say
) -> None:
    """Refuse an output that a node does not share, and an input whose files a reading node cannot open.

    Args:
        folder: the output.
        shards: those that are to be read; a sample of them is opened.
        read: what a read task reserves.
        say: prints what the job waits for.

    Raises:
        RefusedByCluster: a node does not see what it needs; nothing is written.
    """
    sample = evenly_spaced(shards, MAX_SAMPLE)
    proof = f"{PROBE}{uuid.uuid4().hex}"
    folder.put(proof, b"")
    try:
        reports = _ask_nodes(folder, proof, sample, cluster, read, say)
    finally:
        folder.delete(proof)
    for report in reports:
        if report.output is not None:
            raise RefusedByCluster(
                f"output must be storage that all nodes share, got {folder}: on node {report.node}, "
                f"{report.output}; {REMEDY}"
            )
        if report.input is not None:
            raise RefusedByCluster(
                f"input must be storage that all nodes share, got {shards[0].uri}: on node {report.node}, "
                f"none of {len(sample)} sampled files can be opened ({report.input}); {REMEDY}"
            )


def _ask_nodes(
    folder: Folder, proof: str, sample: Sequence[Shard], cluster: Cluster, read: Reservation, say: Say
) -> list[StorageReport]:
    """Ask the nodes that are alive; if none of them reads, wait for the first that does."""
    look = ray.remote(look_at_storage)
    reading = [node for node in cluster.nodes if num_fitting(node, {"CPU": read.num_cpus}, read.labels)]
    arguments = (folder, proof)
    answers = []
    for node in [*reading, *(node for node in cluster.nodes if node not in reading)][:MAX_NODES]:
        on_node = NodeAffinitySchedulingStrategy(node.id, soft=False)
        files = sample if node in reading else []
        answers.append(look.options(num_cpus=0, scheduling_strategy=on_node).remote(*arguments, files))
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)
    reports = [report for answer in done if (report := _answer_of(answer)) is not None]
    if not reading:  # the autoscaler has yet to start one
        answer = look.options(**read.options).remote(*arguments, sample)
        reports.append(wait_for(answer, f"the first reading worker ({read})", say))
    return reports


def _answer_of(answer: Any) -> StorageReport | None:
    """Return what a node sees, or None if it was lost meanwhile."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayError:
        return None


def look_at_storage(folder: Folder, proof: str, sample: Sequence[Shard]) -> StorageReport:
    """Look from this node, and write only if the driver's file is there.

    Args:
        proof: name of the driver's file in the output.
        sample: shards of which one must open; empty if this node does not read.
    """
    node = os.uname().nodename
    try:
        found = folder.get(proof)
        output = None if found is not None else "the driver's files are not there"
        if found is not None:
            folder.require_writable()
    except (OSError, ValueError) as error:
        output = f"it cannot be written ({error})"
    reasons = [reason for shard in sample if (reason := _why_not(shard)) is not None]
    return StorageReport(node, output, reasons[0] if sample and len(reasons) == len(sample) else None)


def _why_not(shard: Shard) -> str | None:
    """Return why the first file of a shard cannot be opened, or None."""
    try:
        with open_below(shard.root, shard.files[0]):
            return None
    except (InputError, OSError, pa.ArrowException) as error:
        return str(error).splitlines()[0]
