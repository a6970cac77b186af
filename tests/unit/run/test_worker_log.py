"""Messages of workers name their run, node and shard, so that they can be told apart."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from blip2_actor import ImageLimits
from pipeline.errors import noted
from pipeline.stages.coordinator import Coordinator
from pipeline.stages.decode import DecodeStage
from pipeline.stages.storage_trouble import tell_coordinator
from pipeline.stages.worker_log import Origin
from pipeline.storage import retrying


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


def decode() -> None:
    DecodeStage(8, ImageLimits(), "image").close()


def write() -> None:
    tell_coordinator(None)
    retrying.listen(None)


@pytest.mark.parametrize("work", [Coordinator, decode, write])
def test_every_worker_of_a_job_labels_its_messages(
    work: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.Handler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    work()
    record = logging.makeLogRecord({"msg": "x"})
    assert handler.filter(record) and hasattr(record, "node")


def test_a_traceback_holds_no_secret() -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        raise ValueError("bad: s3://me:word@bucket/a")
    assert "word" not in str(passed(exc_info=(ValueError, caught.value, caught.tb)).exc_text)
