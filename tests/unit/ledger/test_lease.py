"""Two drivers on one output do all work twice; a lease that outlives its driver blocks the resume."""

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from pipeline.errors import OutputInUse
from pipeline.ledger.layout import LEASE
from pipeline.ledger.lease import Holder, Lease, _process_start, read_holder
from pipeline.storage.folder import Folder


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path))


def elsewhere(**changes) -> Holder:
    return replace(Holder.of_this_process(), machine="another", host="node-7", **changes)


def holder_of(folder: Folder) -> Holder:
    holder = read_holder(folder)
    assert holder is not None
    return holder


def put(folder: Folder, holder: Holder) -> None:
    folder.put(LEASE, json.dumps(asdict(holder)).encode())


def race_for(folder: Folder, monkeypatch: pytest.MonkeyPatch, number: int = 8) -> list[Lease]:
    """Take leases in this process at the same time, after each has seen none; return those that are held."""
    at_once, held = threading.Barrier(number), list[Lease]()
    take = Lease._take

    def wait_and_take(lease: Lease) -> None:
        at_once.wait()
        take(lease)

    monkeypatch.setattr(Lease, "_take", wait_and_take)
    all_tried = threading.Barrier(number)

    def hold() -> None:
        try:
            with Lease(folder) as lease:
                held.append(lease)
                all_tried.wait()
        except OutputInUse as refusal:
            assert "process" in str(refusal)
            all_tried.wait()

    threads = [threading.Thread(target=hold) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return held


def test_a_second_driver_is_refused_with_the_name_of_the_first(folder):
    with Lease(folder), pytest.raises(OutputInUse, match=r"process \d+ on .* started"), Lease(folder):
        pass


def test_of_drivers_that_start_together_one_gets_the_lease(folder, monkeypatch):
    """Each used to see no holder and write; the others found out seconds later."""
    assert len(race_for(folder, monkeypatch)) == 1
    assert folder.names() == []


def test_the_lease_of_a_dead_driver_that_is_found_in_the_race_is_taken(folder, monkeypatch):
    dead = elsewhere(token="dead")
    monkeypatch.setattr(Lease, "_refuse_while_held", lambda lease: lease._dead.add("dead"))
    put(folder, dead)
    with Lease(folder):
        assert holder_of(folder).token != "dead"


def test_the_lease_is_released_at_the_end(folder):
    with Lease(folder):
        pass
    assert read_holder(folder) is None
    with Lease(folder):
        pass


def test_the_lease_of_a_killed_driver_on_this_machine_is_taken_at_once(folder):
    code = (
        "import os, sys, signal; sys.path.insert(0, '.')\n"
        "from pipeline.storage.folder import Folder; from pipeline.ledger.lease import Lease\n"
        f"Lease(Folder({folder.uri!r})).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert read_holder(folder) is not None
    with Lease(folder, dead_after_s=1e9):
        pass


def test_a_driver_elsewhere_without_heartbeats_is_replaced(folder):
    put(folder, elsewhere())
    with Lease(folder, beat_s=0.01, dead_after_s=0.05):
        assert holder_of(folder).host != "node-7"


def test_a_driver_elsewhere_with_heartbeats_keeps_its_lease(folder):
    with Lease(folder, beat_s=0.01) as other:
        other._me = replace(other._me, machine="another", host="node-7")
        while holder_of(folder).host != "node-7":
            assert other._thread.is_alive()
        with pytest.raises(OutputInUse, match="node-7"), Lease(folder, beat_s=0.1, dead_after_s=60):
            pass


def test_a_process_is_known_by_its_start_and_not_by_what_it_does():
    """If the wrong field were read, a driver whose memory has grown would look dead."""
    me = Holder.of_this_process()
    with mmap.mmap(-1, 64 << 20):
        assert not me.is_known_dead
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            living = replace(me, pid=other.pid, process_start=_process_start(other.pid) or "")
            assert replace(me, pid=other.pid).is_known_dead and not living.is_known_dead
        finally:
            other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert living.is_known_dead, "although nobody has asked for its exit code"
    assert replace(me, pid=other.pid).is_known_dead and living.is_known_dead


def test_a_driver_whose_lease_was_taken_notices_and_leaves_it_alone(folder):
    with Lease(folder, beat_s=0.01) as lease:
        while lease._thread.is_alive():  # a heartbeat in progress may overwrite it once
            put(folder, elsewhere(token="other"))
        assert lease.lost
    assert holder_of(folder).token == "other"


def test_a_driver_that_was_suspended_is_certain_of_its_lease_only_after_a_heartbeat(folder, monkeypatch):
    """Another driver may have worked meanwhile, so this one must ask before it writes."""
    with Lease(folder, beat_s=60) as lease:
        assert lease.is_certain
        monkeypatch.setattr(lease, "_confirmed", lease._confirmed - 3600)
        assert not lease.is_certain
        lease.require()
        put(folder, elsewhere(token="other"))
        with pytest.raises(OutputInUse, match="another driver has taken the lease"):
            lease.require()
    with Lease(folder, beat_s=0.01, dead_after_s=0.05) as lease:
        monkeypatch.setattr(lease, "_confirmed", 0.0)
        while not lease.is_certain:
            assert lease._thread.is_alive()
            time.sleep(0.001)


def test_an_output_that_was_deleted_is_not_blamed_on_another_driver_alone(folder, monkeypatch):
    """There was no other driver: the user had deleted the folder during the run."""
    with Lease(folder, beat_s=60) as lease:
        monkeypatch.setattr(lease, "_confirmed", lease._confirmed - 3600)
        folder.delete(LEASE)
        with pytest.raises(OutputInUse, match=r"has taken the lease of .*, or it was deleted"):
            lease.require()


def test_the_source_of_the_progress_can_change_while_the_lease_is_held(folder):
    """The driver is created only after the lease is held, and `status` must show its progress."""
    with Lease(folder, beat_s=0.01) as lease:
        lease.progress = lambda: {"rows": 8}
        while holder_of(folder).progress != {"rows": 8}:
            pass


def test_a_damaged_lease_is_written_again_by_its_driver(folder):
    """The error used to end the thread of the heartbeats, so the driver looked dead half a minute later."""
    with Lease(folder, beat_s=0.01) as lease:
        folder.put(LEASE, b'{"token": ')
        while folder.get(LEASE) == b'{"token": ':
            assert lease._thread.is_alive()
        assert holder_of(folder).token == lease._me.token
    assert read_holder(folder) is None


def test_a_lease_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    """In S3 a reader used to get the start of the next heartbeat, so `status` reported a damaged lease."""
    put(folder, elsewhere(token="other"))
    whole = folder.get(LEASE) or b""
    answers = iter([whole[:-5], whole + bytes(5), whole])
    monkeypatch.setattr(Folder, "get", lambda folder, name: next(answers))
    assert holder_of(folder).token == "other"


def test_the_lease_of_a_driver_of_a_newer_version_is_left_to_it(folder):
    """It used to count as damaged: it was overwritten, and two drivers worked at once."""
    newer = json.dumps(asdict(elsewhere(token="other")) | {"of_a_newer_version": 1}).encode()
    with Lease(folder, beat_s=0.01) as lease:
        while lease._thread.is_alive():
            folder.put(LEASE, newer)
        assert lease.lost
    assert folder.get(LEASE) == newer
    folder.delete(LEASE)
    with Lease(folder, beat_s=60):
        folder.put(LEASE, newer)
    assert folder.get(LEASE) == newer


def test_an_error_of_the_progress_does_not_end_the_heartbeats(folder):
    """If one heartbeat fails, for whatever reason, the next one shows that the driver lives."""
    answers: Iterator[dict | None] = iter([{}, None])

    def progress() -> dict:
        answer = next(answers, {"rows": 7})
        if answer is None:
            raise RuntimeError("dictionary changed size during iteration")
        return answer

    with Lease(folder, beat_s=0.01) as lease:
        lease.progress = progress
        while holder_of(folder).progress != {"rows": 7}:
            assert lease._thread.is_alive()


@pytest.mark.parametrize("content", [b'{"token": ', b"[]", b'{"token": "t", "of_a_newer_version": 1}'])
def test_a_driver_does_not_start_on_a_lease_that_it_cannot_read(folder, content):
    folder.put(LEASE, content)
    with pytest.raises(ValueError, match=r"lease _blip2/lease\.json .* delete the file"), Lease(folder):
        pass
    assert folder.get(LEASE) == content
