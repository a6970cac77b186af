"""The row that kills its process must be found, and no row next to it may fail with it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from pipeline.inputs.reader import ShardReport
from pipeline.rowset import ranges_of
from pipeline.stages.careful_replay import STEP_ROWS, steps
from pipeline.stages.coordinator import MAX_DEATHS_ALONE, Coordinator
from pipeline.stages.device_health import Device
from pipeline.stages.receipts import Receipt
from pipeline.stages.storage_trouble import describe
from pipeline.stages.worker_messages import telling_start
from pipeline.storage.retrying import Trouble

DEVICE = Device("node", "host", ())


def test_a_call_that_ends_is_forgotten():
    coordinator = Coordinator()
    assert coordinator.begin_call("call").num_starts == 1
    coordinator.end_call("call")
    assert coordinator.begin_call("call").num_starts == 1


def test_what_a_worker_does_at_its_start_is_news_until_it_is_ready():
    """During the minutes in which 15 GB are fetched, the terminal used to say "starting"."""
    coordinator: Any = Coordinator()
    remote = SimpleNamespace(starts=SimpleNamespace(remote=coordinator.starts))
    phases, other = logging.getLogger("blip2_actor.phases"), logging.getLogger("blip2_actor.engine")
    before = phases.level
    with telling_start(remote, "a"):
        phases.info("loading the weights")
        other.info("a detail")
        coordinator.starts("b", "fetching a model: 15.5 GB")
        phases.info("testing the model")
        assert coordinator.news().starting == ("fetching a model: 15.5 GB", "testing the model")
    assert coordinator.news().starting == ("fetching a model: 15.5 GB",)
    assert (phases.level, phases.handlers) == (before, [])


def test_a_call_that_died_starts_again_with_what_it_had_written():
    coordinator = Coordinator()
    coordinator.begin_call("call")
    receipt = Receipt("shard", ((0, 2),), (("ok", 2),))
    coordinator.wrote("call", [(0, 2)], [receipt], DEVICE)
    history = coordinator.begin_call("call")
    assert (history.num_starts, list(history.finished), history.receipts) == (2, [(0, 2)], [receipt])
    assert history.deaths_alone == {}


def test_rows_that_ran_together_must_run_alone_and_a_row_fails_at_its_second_death_alone():
    coordinator = Coordinator()
    coordinator.begin_call("call")
    coordinator.begin_call("call")
    coordinator.begin_step("call", [4, 5, 6, 7])  # a death while others ran too does not count
    assert coordinator.begin_call("call").deaths_alone == {4: 0, 5: 0, 6: 0, 7: 0}
    for row in (4, 6, 6):
        coordinator.begin_step("call", [row])
        history = coordinator.begin_call("call")
    assert history.deaths_alone == {4: 1, 5: 0, 6: MAX_DEATHS_ALONE, 7: 0}


def test_rows_that_were_written_need_not_run_alone():
    coordinator = Coordinator()
    coordinator.begin_call("call")
    coordinator.begin_step("call", [0, 1, 2, 3])
    coordinator.wrote("call", [(0, 4)], [], DEVICE)
    assert coordinator.begin_call("call").deaths_alone == {}


def run_until_done(killers: set[int], num_rows: int) -> tuple[set[int], int]:
    """Run a call whose process dies on some rows; return the failed rows and the number of deaths."""
    coordinator = Coordinator()
    failed: set[int] = set()
    coordinator.begin_call("call")  # the first run, with all rows at once
    if not killers:
        return failed, 0
    for deaths in range(1, 100):
        history = coordinator.begin_call("call")
        todo = [row for row in range(num_rows) if row not in history.finished]
        for step in steps(todo, history.deaths_alone):
            if history.deaths_alone.get(step[0], 0) >= MAX_DEATHS_ALONE:
                failed.add(step[0])
            else:
                coordinator.begin_step("call", step)
                if killers & set(step):
                    break
            coordinator.wrote("call", list(ranges_of(step)), [], DEVICE)
        else:
            return failed, deaths
    raise AssertionError("the call never ends")


def test_only_the_rows_that_kill_fail():
    assert run_until_done({100}, 200) == ({100}, 4)
    failed, deaths = run_until_done({0, 31, 32, 199}, 200)
    assert failed == {0, 31, 32, 199}
    assert deaths <= 1 + 4 * 3


def test_blamed_rows_run_alone_and_those_that_have_died_alone_come_last():
    assert list(steps([0, 1, 2, 5, 6, 7], {1: 1, 2: 0, 6: 0})) == [[2], [6], [0, 5, 7], [1]]
    assert [len(step) for step in steps(range(80), {})] == [STEP_ROWS, STEP_ROWS, 16]


def test_receipts_are_returned_once_and_a_silent_worker_ages():
    coordinator = Coordinator()
    receipt = Receipt("shard", ((0, 2),), (("ok", 2),))
    coordinator.begin_call("call")
    coordinator.wrote("call", [(0, 2)], [receipt], DEVICE)
    report = ShardReport(shard="shard", num_rows=2, complete=True)
    coordinator.was_read(report)
    coordinator.report("decode", "worker", 2.0, 4.0)
    news = coordinator.news()
    assert (news.receipts, news.shard_reports) == ([receipt], [report])
    assert news.loads["decode"]["worker"].busy_s == 2.0
    assert news.loads["decode"]["worker"].alive_s >= 4.0
    later = coordinator.news()
    assert (later.receipts, later.shard_reports) == ([], [])
    assert later.loads["decode"]["worker"].alive_s > news.loads["decode"]["worker"].alive_s


def test_trouble_is_known_until_it_ends_and_a_stop_ends_the_tries():
    coordinator = Coordinator()
    full = Trouble("output", "full", 40.0, num_held=1200)
    young = Trouble("input", "failing (503)", 3.0)
    assert coordinator.report_trouble("a", full) and coordinator.report_trouble("b", young)
    assert describe(coordinator.news().troubles) == (
        "output has been full for 40 s; waiting, 1,200 rows held"
    )
    assert coordinator.report_trouble("a", None)
    assert describe(coordinator.news().troubles) == "input has been failing (503) for 3 s; waiting"
    coordinator.stop()
    assert not coordinator.report_trouble("b", young)
    coordinator.report_trouble("b", None)
    assert describe(coordinator.news().troubles) is None
