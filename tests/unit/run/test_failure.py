"""The message when Ray gives up: the cause, without what Ray wraps around it."""

from __future__ import annotations

import os
import pickle
import traceback

import pytest

from pipeline.endpoint.waiting import KeyRefused
from pipeline.errors import Stopped, noted
from pipeline.exit_status import ExitStatus, status_of
from pipeline.run.failure import describe_failure, end_named_by
from pipeline.stages.coordinator import Coordinator
from pipeline.stages.device_health import MAX_FAILURES, Device, DeviceLeftOut
from pipeline.storage.retrying import Trouble

TRACE = """ray::MapWorker(MapBatches(WriteStage)).submit() (pid=7, ip=10.0.0.1)
  File "/site/pipeline/stages/write.py", line 74, in __call__
    raise ValueError("x")
"""
ADVICE = """
Failed to run map task after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext`"""


WRAPPED = """
while captioning 0.tar:0-383 on node n1

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(WriteStage)).submit() (pid=7, ip=10.0.0.1)
ray.exceptions.UserCodeException: UDF failed to process a data block."""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            f"{TRACE}PermissionError: [Errno 13] no: '/out'{WRAPPED}{ADVICE}",
            "PermissionError: [Errno 13] no: '/out', while captioning 0.tar:0-383 on node n1",
        ),
        (f"ray.exceptions.UserCodeException: UDF failed.{ADVICE}", "UserCodeException: UDF failed"),
        (f"{TRACE}ValueError: the models differ.{ADVICE}", "the models differ"),
        (f"{TRACE}KeyError: 'x'{ADVICE}", "KeyError: 'x'"),
        (f"{TRACE}pyarrow.lib.ArrowInvalid: no\n  a.b.SomeError: second{ADVICE}", "SomeError: second"),
        (f"{TRACE}PermissionError: [Errno 13] no: '/out'", "PermissionError: [Errno 13] no: '/out'"),
        ("The actor died unexpectedly before finishing this task.", "The actor died unexpectedly"),
        (f"{TRACE}OSError: s3://me:pw@bucket/a?key=hidden is gone", "s3://bucket/a is gone"),
        ("", "Exception"),
    ],
)
def test_the_cause_alone_is_said(said, expected):
    assert describe_failure(Exception(said)).startswith(expected)
    assert "retry attempts" not in describe_failure(Exception(said))


def test_stage_node_and_file_are_said_of_a_worker_of_ray():
    """The error used to say what was wrong, but not in which of ten thousand files."""
    with pytest.raises(PermissionError) as caught, noted("a wider block"), noted("reading /in/a.tar"):
        raise PermissionError(13, "no", "/in/a.tar")
    moved = pickle.loads(pickle.dumps(caught.value))
    said = "".join(traceback.format_exception(moved))
    where = f"while reading /in/a.tar on node {os.uname().nodename}"
    expected = f"PermissionError: [Errno 13] no: '/in/a.tar', {where}"
    assert describe_failure(Exception(f"{TRACE}{said}{ADVICE}")) == expected


def test_the_note_of_the_innermost_block_counts():
    with pytest.raises(KeyError) as caught, noted("outer"), noted("inner"):
        raise KeyError("x")
    assert [note.partition(" on node ")[0] for note in caught.value.__notes__] == ["while inner"]


def test_a_job_ends_when_its_endpoint_refuses_the_key_for_long():
    """It used to wait forever, which is right only while a store or an endpoint is gone."""
    coordinator = Coordinator()

    def told(trouble: Trouble) -> Stopped | None:
        coordinator.report_trouble("worker", pickle.loads(pickle.dumps(trouble)))
        return end_named_by(coordinator.news())

    assert told(Trouble("endpoint", "out of reach (http://web is gone)", 9999.0)) is None
    end = told(KeyRefused("endpoint", "refusing the key (http://web answers 401: no)", 901.0))
    assert str(end) == (
        "the endpoint has been refusing the key (http://web answers 401: no) for 15 min; finished work is "
        "kept; allow the key again, or give another with --endpoint-key-file, and run the same command to "
        "resume"
    )
    assert end is not None and status_of(end) is ExitStatus.FAILED


def test_a_job_ends_when_a_device_has_failed_several_times():
    coordinator, device = Coordinator(), Device("id", "node", ("0",))
    for number in range(1, MAX_FAILURES + 1):
        coordinator.device_failed(device, "lost", [])
        assert isinstance(end_named_by(coordinator.news()), DeviceLeftOut) is (number == MAX_FAILURES)
