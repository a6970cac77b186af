"""What a person reads when Ray gives up: the cause, and nothing of what Ray wraps it in."""

from __future__ import annotations

import pytest

from pipeline.run.failure import describe_failure

TRACE = """ray::MapWorker(MapBatches(WriteStage)).submit() (pid=7, ip=10.0.0.1)
  File "/site/pipeline/stages/write.py", line 74, in __call__
    raise ValueError("x")
"""
ADVICE = """
Failed to run map task after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext`"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
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
