"""A call that must run alone must neither wait forever nor run next to another one."""

import threading

from pipeline.stages.shared_exclusive_lock import SharedExclusiveLock


def test_exclusive_access_waits_for_shared_access_and_keeps_new_calls_out():
    lock, order = SharedExclusiveLock(), []
    inside, leave = threading.Event(), threading.Event()

    def share() -> None:
        with lock.shared():
            inside.set()
            leave.wait()
            order.append("first")

    def run_alone() -> None:
        inside.wait()
        with lock.exclusive():
            order.append("alone")

    def share_later() -> None:
        with lock.shared():
            order.append("late")

    threads = [threading.Thread(target=target) for target in (share, run_alone)]
    for thread in threads:
        thread.start()
    while not lock.is_exclusive_wanted:
        pass
    threads.append(threading.Thread(target=share_later))
    threads[-1].start()
    leave.set()
    for thread in threads:
        thread.join(timeout=10)
    assert order == ["first", "alone", "late"]
