"""Messages of workers could not be told apart: of which run, node and shard each was."""

from __future__ import annotations

import logging

import pytest

from pipeline.errors import noted
from pipeline.stages.worker_log import Origin


def passed(**changes: object) -> logging.LogRecord:
    values = {"name": "x", "msg": "at %s", "args": ("s3://me:word@bucket/a",), "levelno": logging.INFO}
    record = logging.makeLogRecord(values | changes)
    assert Origin("run7").filter(record)
    return record


def test_a_message_says_its_run_node_and_shard_and_no_secret() -> None:
    with noted("reading it", "a.tar"):
        record = passed()
    assert (record.run, record.shard) == ("run7", "a.tar") and record.node  # type: ignore[attr-defined]
    assert record.getMessage() == "at s3://bucket/a"
    assert not hasattr(passed(), "shard"), "outside a shard"
    assert passed(args=("a", "b")).args == ("a", "b"), "what cannot be formatted is left to the handler"
    assert passed(shard="b.tar").shard == "b.tar"  # type: ignore[attr-defined]


def test_a_traceback_holds_no_secret() -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        raise ValueError("bad: s3://me:word@bucket/a")
    assert "word" not in str(passed(exc_info=(ValueError, caught.value, caught.tb)).exc_text)
