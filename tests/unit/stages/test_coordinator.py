"""The row that kills its process must be found alone, and no neighbour condemned with it."""

import threading

from pipeline.ledger.rowset import RowSet
from pipeline.stages.coordinator import Coordinator, Receipt
from pipeline.stages.write import CAREFUL_ROWS, SharedExclusiveLock, careful_steps


def test_a_call_that_ends_is_forgotten():
    coordinator = Coordinator()
    assert coordinator.begin("call").number == 1
    coordinator.end("call")
    assert coordinator.begin("call").number == 1


def test_a_call_that_dies_comes_back_with_what_it_had_written():
    coordinator = Coordinator()
    coordinator.begin("call")
    receipt = Receipt("shard", ((0, 2),), (("ok", 2),))
    coordinator.wrote("call", [(0, 2)], [receipt])
    again = coordinator.begin("call")
    assert (again.number, again.finished, again.receipts) == (2, ((0, 2),), (receipt,))
    assert (again.suspects, again.condemned) == ((), frozenset())


def test_rows_that_ran_together_become_suspects_and_a_row_alone_is_condemned_at_its_second_death():
    coordinator = Coordinator()
    coordinator.begin("call")
    coordinator.begin("call")
    coordinator.trying("call", 4, 8)
    assert coordinator.begin("call").suspects == ((4, 8),)
    for row in (4, 6):  # a death among others does not count
        coordinator.trying("call", row, row + 1)
        assert coordinator.begin("call").condemned == frozenset()
    coordinator.trying("call", 6, 7)
    assert coordinator.begin("call").condemned == {6}


def test_rows_that_were_written_are_not_suspected():
    coordinator = Coordinator()
    coordinator.begin("call")
    coordinator.trying("call", 0, 4)
    coordinator.wrote("call", [(0, 4)], [])
    assert coordinator.begin("call").suspects == ()


def run_until_done(poison: set[int], num_rows: int) -> tuple[set[int], int]:
    """Play a call whose process dies on poison rows; give the condemned rows and the deaths."""
    coordinator, failed = Coordinator(), set()
    coordinator.begin("call")  # the first attempt, all at once
    if not poison:
        return failed, 0
    for deaths in range(1, 100):
        attempt = coordinator.begin("call")
        todo = [row for row in range(num_rows) if row not in RowSet(attempt.finished)]
        for step in careful_steps(todo, RowSet(attempt.suspects)):
            if step[0] in attempt.condemned:
                failed.add(step[0])
            else:
                coordinator.trying("call", step[0], step[-1] + 1)
                if poison & set(step):
                    break
            coordinator.wrote("call", [(step[0], step[-1] + 1)], [])
        else:
            return failed, deaths
    raise AssertionError("never done")


def test_exactly_the_poison_is_condemned():
    assert run_until_done({100}, 200) == ({100}, 4)
    failed, deaths = run_until_done({0, 31, 32, 199}, 200)
    assert failed == {0, 31, 32, 199}
    assert deaths <= 1 + 4 * 3


def test_steps_are_runs_of_neighbours_and_suspects_go_alone():
    todo = [0, 1, 2, 5, 6, 7]
    assert list(careful_steps(todo, RowSet([(1, 2), (6, 8)]))) == [[0], [1], [2], [5], [6], [7]]
    assert [len(step) for step in careful_steps(range(80), RowSet())] == [CAREFUL_ROWS, CAREFUL_ROWS, 16]


def test_news_are_told_once_and_a_silent_worker_ages():
    coordinator = Coordinator()
    receipt = Receipt("shard", ((0, 2),), (("ok", 2),))
    coordinator.begin("call")
    coordinator.wrote("call", [(0, 2)], [receipt])
    coordinator.report("decode", "worker", 2.0, 4.0)
    receipts, loads = coordinator.news()
    assert receipts == [receipt]
    assert loads["decode"]["worker"].busy_s == 2.0
    assert loads["decode"]["worker"].alive_s >= 4.0
    later, loads_later = coordinator.news()
    assert later == []
    assert loads_later["decode"]["worker"].alive_s > loads["decode"]["worker"].alive_s


def test_who_wants_the_room_alone_waits_for_the_others_and_keeps_new_ones_out():
    room, order = SharedExclusiveLock(), []
    inside, leave, waiting = threading.Event(), threading.Event(), threading.Event()

    def sharing() -> None:
        with room.shared():
            inside.set()
            leave.wait()
            order.append("first")

    def wanting_alone() -> None:
        inside.wait()
        waiting.set()
        with room.exclusive():
            order.append("alone")

    def late() -> None:
        with room.shared():
            order.append("late")

    threads = [threading.Thread(target=target) for target in (sharing, wanting_alone)]
    for thread in threads:
        thread.start()
    waiting.wait()
    while not room._want_alone:
        pass
    threads.append(threading.Thread(target=late))
    threads[-1].start()
    leave.set()
    for thread in threads:
        thread.join(timeout=10)
    assert order == ["first", "alone", "late"]
