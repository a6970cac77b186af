"""A program that builds engines in forked children, each of which ends in one of the ways below.

    python -m tests.unit.engine.exit.ways FOLDER WAY...

For each way, it prints the child's exit status (negative: the signal that has ended it) and what it printed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from blip2_actor import Engine, GenerationOptions, Request
from blip2_actor.engine import startup
from blip2_actor.testing import random_images, save_tiny_checkpoint
from tests.engines import cpu_config

PICTURE = random_images(1)[0].numpy()
KEPT: list[Engine] = []
"""Engines that are kept until the program ends."""
LONG = GenerationOptions(max_new_tokens=20, min_new_tokens=20)


def build(folder: Path) -> Engine:
    return cpu_config(folder, max_slots=4, skip_self_test=True).build()


def say(text: str) -> None:
    os.write(1, f"{text} ".encode())


def replace(place: Any, name: str, other: Any) -> None:
    """Replace a function or method until the program ends."""
    setattr(place, name, other)


class SlowToFree:
    """Stands for the weights of a large model."""

    def __init__(self) -> None:
        self.is_being_freed = threading.Event()

    def __del__(self) -> None:
        self.is_being_freed.set()
        time.sleep(0.3)
        say("freed")


def released(folder: Path) -> None:
    """Nobody holds the engine any longer: its thread ends by itself and frees the model."""
    engine = build(folder)
    weights = SlowToFree()
    is_being_freed = weights.is_being_freed
    replace(engine.model, "weights", weights)
    assert engine.generate([PICTURE])[0].ok
    del weights, engine
    assert is_being_freed.wait(30)


def at_work(folder: Path) -> Engine:
    """Return an engine in the middle of a step, which takes 0.5 s."""
    engine = build(folder)
    decode, is_within = engine._core.runner.decode, threading.Event()

    def slow(*args: Any) -> Any:
        is_within.set()
        time.sleep(0.5)
        say("step")
        return decode(*args)

    replace(engine._core.runner, "decode", slow)
    for _ in range(9):
        engine.submit(Request(image=PICTURE), LONG)
    assert is_within.wait(30)
    return engine


def interrupt(*after_s: float) -> None:
    """Press Ctrl-C at these times after the exit has begun."""

    has_begun = threading.Event()

    def press() -> None:
        has_begun.wait()
        for seconds in after_s:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()  # Python 3.12 starts none once the exit has begun
    atexit.register(has_begun.set)


def interrupted(folder: Path) -> None:
    KEPT.append(at_work(folder))
    interrupt(0.1)


def interrupted_twice(folder: Path) -> None:
    KEPT.append(at_work(folder))
    interrupt(0.1, 0.1)


def exiting_callbacks(folder: Path) -> None:
    """Futures whose callbacks end the thread that they run in."""

    def leave(future: Future[Any]) -> None:
        raise SystemExit(3)

    KEPT.append(at_work(folder))
    for _ in range(9):
        KEPT[0].submit(Request(image=PICTURE), LONG).add_done_callback(leave)


def resubmitting_callbacks(folder: Path) -> None:
    """Callers that retry when their request is cancelled."""
    KEPT.append(at_work(folder))

    def submit() -> None:
        KEPT[0].submit(Request(image=PICTURE), LONG).add_done_callback(again)

    def again(future: Future[Any]) -> None:
        try:
            submit()
            say("accepted")
        except RuntimeError:
            say("refused")

    submit()


def no_thread(folder: Path) -> None:
    """The system refuses to create more threads."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    replace(threading.Thread, "start", start)
    try:
        build(folder)
    except RuntimeError as error:
        say(str(error))


def loading(folder: Path) -> None:
    """Ctrl-C while the weights are loaded: nothing more is done with them."""
    load = startup.load_model
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def slow(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        say("loaded")
        return load(*args)

    replace(startup, "load_model", slow)
    replace(startup, "size_engine", lambda *_, **__: say("sized"))
    try:
        build(folder)
    except KeyboardInterrupt:
        say("interrupted")


def status_and_output(folder: Path, way: str) -> tuple[int, str]:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1)
        os.close(reading)
        globals()[way](folder)
        sys.exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        output = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.strip()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    folder = save_tiny_checkpoint(Path(sys.argv[1]))
    print(json.dumps({way: status_and_output(folder, way) for way in sys.argv[2:]}))
