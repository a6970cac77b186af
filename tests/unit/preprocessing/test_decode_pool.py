"""Decoding children really die, hang and exhaust their memory; only the hostile image fails."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blip2_actor import DecodedImage, DecodePool, ImageLimits, Status, decode_image
from blip2_actor.preprocessing import decode_process
from blip2_actor.preprocessing.decode_messages import BadReply, pack_reply, unpack_reply
from tests.unit.preprocessing.image_corpus import encode, malformed_images, noise

SIZE = 32
HOSTILE_CHILD = (sys.executable, str(Path(__file__).with_name("hostile_child.py")))
GOOD = [encode(noise(40, 30, seed), "PNG") for seed in range(8)]
EXPECTED = [decode_image(data, SIZE) for data in GOOD]


def attack(name: str, *arguments: object) -> bytes:
    return " ".join(["BM" + name, *map(str, arguments)]).encode()


def hostile_pool(folder: Path, num_children: int = 1, **limits: Any) -> DecodePool:
    return DecodePool(SIZE, ImageLimits(**limits), num_children, command=(*HOSTILE_CHILD, str(folder)))


def outcome_among_neighbors(pool: DecodePool, hostile: bytes) -> DecodedImage:
    """Decode a hostile image among good ones, whose results must not change now or afterwards."""
    *before, outcome, last = pool.decode([*GOOD[:3], hostile, GOOD[3]])
    assert [*before, last] == EXPECTED[:4]
    assert pool.decode(GOOD) == EXPECTED
    return outcome


@pytest.mark.parametrize(
    ("name", "limits", "status", "reason"),
    [
        ("segfault", {}, Status.DECODER_CRASHED, "died twice on this image (SIGSEGV)"),
        ("leave", {}, Status.DECODER_CRASHED, "died twice on this image (exit code 3)"),
        ("write_garbage", {}, Status.DECODER_CRASHED, "died twice on this image (SIGKILL)"),
        ("spin", {"cpu_s": 0.2}, Status.DECODER_TIMED_OUT, "more than cpu_s (0.2 s of CPU time)"),
        ("sleep", {"wall_s": 1}, Status.DECODER_TIMED_OUT, "more than wall_s (1 s)"),
        ("stop", {"wall_s": 1}, Status.DECODER_TIMED_OUT, "more than wall_s (1 s)"),
        (
            "use_up_memory",
            {"memory_bytes": 300 << 20},
            Status.TOO_LARGE,
            "more than memory_bytes (314572800)",
        ),
        ("print_much", {}, Status.OK, None),
    ],
)
def test_a_hostile_image_fails_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    limits: dict[str, Any],
    status: Status,
    reason: str | None,
) -> None:
    monkeypatch.setattr(decode_process, "_OVERDUE_S", 3.0)  # for the stopped child
    with hostile_pool(tmp_path, num_children=2, **limits) as pool:
        image = outcome_among_neighbors(pool, attack(name))
    assert image.status is status
    assert (image.error is None) if reason is None else (reason in (image.error or ""))


def test_a_reply_with_an_impossible_status_is_none() -> None:
    """A child that an image has taken over may write anything."""
    reply = bytearray(pack_reply(DecodedImage(status=Status.UNDECODABLE, error="cut off")))
    for reply[0] in range(len(Status), 256):
        with pytest.raises(BadReply):
            unpack_reply(memoryview(reply), 0, SIZE * SIZE * 3)


def test_many_hostile_images_in_a_row_each_get_their_own_outcome(tmp_path: Path) -> None:
    """The next image must not be blamed, and three deaths in a row must not count as failed starts."""
    batch = [
        attack("segfault"),
        attack("leave"),
        GOOD[0],
        attack("segfault"),
        attack("segfault"),
        attack("leave"),
        GOOD[1],
    ]
    with hostile_pool(tmp_path) as pool:
        statuses = [image.status for image in pool.decode(batch)]
    crashed = Status.DECODER_CRASHED
    assert statuses == [crashed, crashed, Status.OK, crashed, crashed, crashed, Status.OK]


def test_an_image_is_not_blamed_for_a_single_death(tmp_path: Path) -> None:
    """The out-of-memory killer, or memory damaged by the image before, must not fail a good image."""
    with hostile_pool(tmp_path) as pool:
        image = outcome_among_neighbors(pool, attack("segfault_before", 2))
    assert (tmp_path / "starts").stat().st_size == 2
    assert image.status is Status.OK


def test_every_image_has_a_second_try_of_its_own(tmp_path: Path) -> None:
    """The second try of one image, successful or not, must not use up that of the next image."""
    batch = [attack("leave"), attack("segfault_before", 4), attack("segfault_before", 5)]
    with hostile_pool(tmp_path) as pool:
        statuses = [image.status for image in pool.decode(batch)]
    assert statuses == [Status.DECODER_CRASHED, Status.OK, Status.OK]


def test_a_child_killed_between_two_calls_is_not_noticed(tmp_path: Path) -> None:
    with hostile_pool(tmp_path) as pool:
        child = child_pid(pool)
        os.kill(child, signal.SIGKILL)
        assert ends(child)
        assert pool.decode(GOOD) == EXPECTED


def child_pid(pool: DecodePool) -> int:
    error = pool.decode([attack("tell_pid")])[0].error or ""
    return int(error.rpartition(" pid ")[2])


def test_a_child_has_the_session_of_its_parent_but_not_its_ctrl_c(tmp_path: Path) -> None:
    """Linux shares CPU time by session: with its own one, a child made small pictures wait up to 0.6 s."""
    with hostile_pool(tmp_path) as pool:
        child = child_pid(pool)
        assert (os.getsid(child), os.getpgid(child)) == (os.getsid(0), child)


def ends(pid: int) -> bool:
    """Wait for the end of a process that is not a child of this one, or is not reaped yet."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 20)[0])
    finally:
        os.close(process)


@pytest.mark.parametrize("doing", ["nothing", "sleep"])
def test_children_die_with_their_parent(tmp_path: Path, doing: str) -> None:
    """A preempted worker must leave no decoding process behind, not even one that sleeps inside an image."""
    program = (
        "import sys, os; sys.path[:0] = [os.getcwd()]\n"
        "from tests.unit.preprocessing.test_decode_pool import child_pid, hostile_pool, attack, Path\n"
        "pool = hostile_pool(Path(sys.argv[1]), wall_s=2)\n"
        "print(child_pid(pool), flush=True)\n"
        "if sys.argv[2] == 'sleep': pool.decode([attack('sleep')])\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), doing]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert ends(child)


def test_a_child_that_cannot_start_is_an_error_and_not_a_status() -> None:
    """A broken installation must not mark a million good images as crashed."""
    with DecodePool(SIZE, command=(sys.executable, "-c", "raise SystemExit(7)")) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="children must start, got exit code 7 3 times"):
                pool.decode(GOOD)


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_children_start_for_a_program_that_has_closed_its_standard_files(closed: tuple[int, ...]) -> None:
    """The child's replies used to go to its standard error, and so nowhere."""
    program = (
        "import os, sys; sys.path[:0] = [os.getcwd()]\n"
        "from tests.unit.preprocessing.test_decode_pool import SIZE, GOOD, EXPECTED, DecodePool\n"
        f"for fd in {closed}: os.close(fd)\n"
        "with DecodePool(SIZE) as pool: os._exit(0 if pool.decode(GOOD) == EXPECTED else 3)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_a_program_that_is_no_child_is_an_error_too() -> None:
    """Something in the installation may print when Python starts."""
    command = (sys.executable, "-c", "print('Welcome!' * 9000)")
    with DecodePool(SIZE, command=command) as pool, pytest.raises(RuntimeError, match="must start"):
        pool.decode(GOOD)


def test_order_and_pixels_equal_those_of_decode_image() -> None:
    batch: list[bytes | None] = [encode(noise(8 + i % 50, 9, i), "PNG") for i in range(200)]
    batch[5:5] = [None, b"", b"no image", GOOD[0][:100]]
    with DecodePool(SIZE, num_children=2) as pool:
        assert pool.decode(batch) == [decode_image(data, SIZE) for data in batch]
        assert pool.decode([]) == []


def test_a_child_accepts_truncated_images_and_says_so() -> None:
    whole = encode(noise(40, 30), "JPEG")
    accept = ImageLimits(accept_truncated=True)
    with DecodePool(SIZE, accept) as pool:
        decoded = pool.decode([whole, whole[:-20]])
    assert decoded == [decode_image(data, SIZE, accept) for data in (whole, whole[:-20])]
    assert [image.is_truncated for image in decoded] == [False, True]


def test_files_and_answers_larger_than_the_pipes_do_not_block() -> None:
    """Otherwise parent and child would wait for each other, each with a full pipe."""
    large = [encode(noise(800, 800, seed), "BMP") for seed in range(4)] * 3
    with DecodePool(700, num_children=2) as pool:
        decoded = pool.decode(large)
    expected = [decode_image(data, 700) for data in large[:4]]
    assert decoded == expected * 3


def test_calls_from_many_threads_share_the_children() -> None:
    with DecodePool(SIZE, num_children=2) as pool, ThreadPoolExecutor(8) as threads:
        batches = [GOOD[start:] + GOOD[:start] for start in range(8)] * 4
        for start, decoded in enumerate(threads.map(pool.decode, batches)):
            assert decoded == EXPECTED[start % 8 :] + EXPECTED[: start % 8]


def test_two_calls_of_one_image_run_at_once(tmp_path: Path) -> None:
    """An online host decodes one request at a time: one call must not keep all children."""
    with hostile_pool(tmp_path, num_children=2) as pool:
        pool.decode(GOOD)  # starts the children
        first = threading.Thread(target=pool.decode, args=([attack("stop")],))
        first.start()
        stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOWAIT)
        assert stopped is not None
        try:
            assert pool.decode(GOOD) == EXPECTED
            assert first.is_alive()
        finally:
            os.kill(stopped.si_pid, signal.SIGCONT)
            first.join()


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_a_smaller_limit_of_the_parent_holds() -> None:
    """No process may raise it again, so every child used to end at its start, and the whole job with it."""
    limited = ("sh", "-c", 'ulimit -v 1000000; exec "$0" "$@"', *decode_process.CHILD_COMMAND)
    with DecodePool(SIZE, command=limited) as pool:
        assert pool.decode(GOOD) == EXPECTED


def test_limits_hold_before_bytes_are_sent() -> None:
    with DecodePool(
        SIZE, ImageLimits(max_file_bytes=len(attack("segfault")) - 1), command=HOSTILE_CHILD
    ) as pool:
        assert pool.decode([attack("segfault")])[0].status is Status.TOO_LARGE


def test_a_closed_pool_raises() -> None:
    pool = DecodePool(SIZE)
    assert pool.decode(GOOD[:1]) == EXPECTED[:1]
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="must be open"):
        pool.decode(GOOD)


@pytest.mark.parametrize(("size_px", "num_children", "name"), [(0, 1, "size_px"), (8, 0, "num_children")])
def test_impossible_sizes_are_refused(size_px: int, num_children: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        DecodePool(size_px, num_children=num_children)


def test_every_malformed_image_has_an_outcome_and_its_neighbors_are_unchanged() -> None:
    """300 damaged files of every format, each between good ones: none is lost, and two runs agree."""
    names, damaged = zip(*malformed_images(300, seed=11), strict=True)
    batch = [data for index, bad in enumerate(damaged) for data in (bad, GOOD[index % 8])]
    with DecodePool(SIZE, num_children=2) as pool:
        decoded = pool.decode(batch)
        again = pool.decode(batch)

    assert decoded == again
    assert decoded[1::2] == [EXPECTED[index % 8] for index in range(300)]
    for name, image in zip(names, decoded[::2], strict=True):
        if image.status is Status.OK:
            assert image.error is None and image.pixels is not None, name
            assert len(image.pixels) == SIZE * SIZE * 3 and image.width and image.height, name
        else:
            assert image.pixels is None and image.width is None and image.height is None, name
            assert image.error and image.error.isprintable() and len(image.error) < 300, name
    statuses = {image.status for image in decoded[::2]}
    assert {Status.OK, Status.UNDECODABLE, Status.TOO_LARGE} <= statuses


MOST: dict[str, Any] = {"cpu_s": 1_000_000_000, "wall_s": 2_000_000, "memory_bytes": (1 << 63) - 1}


def test_the_largest_limits_decode():
    with DecodePool(SIZE, ImageLimits(**MOST)) as pool:
        assert pool.decode(GOOD[:1]) == EXPECTED[:1]


@pytest.mark.parametrize("name", MOST)
def test_a_limit_that_no_timer_takes_is_refused(name):
    """With such a limit, no image could be decoded, or an OverflowError ended the job."""
    with pytest.raises(ValueError, match=f"{name} must be at most {MOST[name]:,}, got "):
        ImageLimits(**{name: MOST[name] + 1})
