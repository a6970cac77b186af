"""A signal ends a command with a sentence: at once before work, and in good order during the job."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.errors import Interrupted
from pipeline.run import signals
from pipeline.run.signals import SIGNALS, StopRequest, keeping_handlers


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """Handle signals as in a terminal: a process in the background ignores some of them."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_work_a_signal_ends_the_command_at_once(number):
    """Ctrl-C during start-up used to be a traceback, and a hang-up killed the driver silently."""
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.by_signals(), pytest.raises(Interrupted, match=f"stopped at once by {number.name}"):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert stop.number == number, "threads look at it"


def test_a_signal_in_a_call_of_ray_is_the_signal_and_not_ctrl_c():
    """SIGTERM while the driver looked at the cluster used to be a traceback, with the status of Ctrl-C."""
    stop = StopRequest()
    with pytest.raises(Interrupted, match="stopped at once by SIGTERM"), stop.by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None  # as `ray.get` does
    with pytest.raises(KeyboardInterrupt) as raised, StopRequest().by_signals():
        raise KeyboardInterrupt  # from a library, without a signal
    assert raised.type is KeyboardInterrupt


def test_at_work_the_first_signal_is_noted_and_a_second_ctrl_c_ends_the_process():
    stop = StopRequest()
    with stop.by_signals(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGTERM, "the first signal decides the exit status"


def test_a_deadline_is_a_signal_of_its_own():
    stop = StopRequest(datetime.now(UTC) + timedelta(milliseconds=20))
    with stop.by_signals(), pytest.raises(Interrupted, match="stopped at once by --deadline"):
        threading.Event().wait(10)
    assert stop.number == signal.SIGALRM
    with StopRequest(datetime.now(UTC) + timedelta(hours=1)).by_signals():
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "it must not ring after the run"


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup lets a job outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_ray_does_to_the_handlers_is_undone():
    """`ray.init` replaces the handler of SIGTERM: the job used to end silently with status 15."""
    stop = StopRequest()
    with stop.by_signals(), stop.deferred():
        with keeping_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    assert stop.number == signal.SIGTERM


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with StopRequest().by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


HELD = """
import hashlib, signal, sys, threading, time
from pipeline.run import signals

signals.HANDLED_WITHIN_S = 0.2
with signals.StopRequest(is_command=True).by_signals():
    threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # hours, without any Python code
"""


def test_a_library_that_does_not_return_holds_no_signal():
    ended = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 143
    assert ended.stderr == (
        "blip2: stopped at once by SIGTERM: a library did not return; finished work is kept\n"
    )


def test_the_cursor_is_shown_when_a_command_is_ended_below_its_bars():
    """The bars hide the cursor: after Ctrl-C during Ray's start, it used to stay hidden in the shell."""
    code = "import os; os.environ['TERM'] = 'xterm'; from pipeline.progress import Console\n"
    code += f"area = Console().area(); area.__enter__()\n{HELD}"
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        ended = subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, timeout=60)
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the terminal is closed
            while piece := terminal.read(4096):
                shown += piece
    assert ended.returncode == 143
    assert b"\x1b[?25l" in shown, "the bars were not shown"
    assert b"\n\x1b[?25hblip2: stopped at once by SIGTERM" in shown


HELD_LATER = """
import os, signal, threading
from contextlib import nullcontext
from pipeline.errors import Interrupted
from pipeline.run import signals
from pipeline.storage.retrying import retry_on_oserror

signals.{limit} = 0.2
signals.NO_ANSWER_S = 0.1
forever = threading.Event().wait  # as for the heartbeat of a lease in a store that does not answer
with signals.StopRequest(is_command=True).by_signals(), signals.StopRequest().by_signals() as stop:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # as while Ray starts
    try:
        with {when}:
            signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        pass
    {waits}
"""


@pytest.mark.parametrize(
    ("limit", "when", "waits"),
    [
        ("ENDED_WITHIN_S", "stop.deferred()", "forever()"),
        ("ENDED_SOON_WITHIN_S", "nullcontext()", "forever()"),
        ("ENDED_SOON_WITHIN_S", "stop.deferred()", "stop.store_fails = True; forever()"),
        (
            "ENDED_SOON_WITHIN_S",
            "stop.deferred()",
            "signals.ENDED_SOON_WITHIN_S = 1; stop.store_fails = True; forever(0.5); "
            "stop.store_fails = False; forever()",
        ),
        ("ENDED_SOON_WITHIN_S", "stop.deferred()", "retry_on_oserror(forever)"),
    ],
    ids=["at_work", "before_work", "store_fails", "store_has_failed", "no_answer"],
)
def test_nothing_holds_a_command_that_was_stopped(limit, when, waits):
    """After SIGTERM, a driver used to run on for minutes, until Ray or the operator killed it."""
    code = HELD_LATER.format(limit=limit, when=when, waits=waits)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 143
    assert ended.stderr == (
        "blip2: stopped at once by SIGTERM: a store or Ray did not return; finished work is kept\n"
    )


def test_a_program_that_runs_a_job_is_never_ended(monkeypatch):
    """If the end took long, Ctrl-C in a notebook used to end the interpreter and lose all its state."""
    monkeypatch.setattr(signals, "HANDLED_WITHIN_S", 0.0)
    monkeypatch.setattr(signals, "ENDED_SOON_WITHIN_S", 0.0)
    with pytest.raises(Interrupted), StopRequest().by_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            threading.Event().wait(3 * signals.LOOK_EVERY_S)


def test_a_signal_that_is_handled_ends_nothing_later(monkeypatch):
    monkeypatch.setattr(signals, "HANDLED_WITHIN_S", 0.5)
    request = StopRequest(is_command=True)
    with request.by_signals(), request.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait(0.8)
    assert request.number == signal.SIGTERM


def test_a_signal_of_another_part_of_the_program_ends_nothing(monkeypatch):
    monkeypatch.setattr(signals, "HANDLED_WITHIN_S", 0.2)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        with StopRequest(is_command=True).by_signals():
            signal.raise_signal(signal.SIGCHLD)
            threading.Event().wait(0.5)
    finally:
        signal.signal(signal.SIGCHLD, before)
