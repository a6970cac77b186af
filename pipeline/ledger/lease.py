"""The lease: one driver per output folder; a second driver is refused, with the name of the first.

A driver shows that it lives by its heartbeat, a number that changes. Clocks of two machines are never
compared. On the same machine a dead driver is recognized at once, so that running the command again after a
kill does not wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from pipeline.errors import OutputInUse
from pipeline.ledger.layout import LEASE
from pipeline.storage.folder import Folder

BEAT_S = 5.0
"""Seconds between heartbeats."""
DEAD_AFTER_S = 30.0
"""A driver whose heartbeat does not change for this long is dead."""


@dataclass(frozen=True)
class Holder:
    """The driver that holds a lease."""

    token: str
    host: str
    machine: str
    """Boot and process namespace: a process of the same machine can be looked up by its id."""
    pid: int
    process_start: str
    """When the process started, in ticks of the machine, because a process id may be used again."""
    started: str
    beat: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    """The last progress of the driver, for `status`."""

    @classmethod
    def of_this_process(cls) -> Holder:
        pid = os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            process_start=_process_start(pid) or "",
            started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @property
    def is_on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_known_dead(self) -> bool:
        """True when the process has certainly ended; False also when that cannot be known."""
        return self.is_on_this_machine and _process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def read_holder(folder: Folder) -> Holder | None:
    """Return the driver that holds the lease, dead or alive, or None."""
    content = folder.get(LEASE)
    return Holder(**json.loads(content)) if content else None


class Lease:
    """The lease of this process, held inside `with Lease(...)`; a thread sends the heartbeats.

    Its folder must not retry: a heartbeat that waits for the store looks like a dead driver.
    """

    def __init__(
        self,
        folder: Folder,
        progress: Callable[[], dict[str, Any]] = dict,
        beat_s: float = BEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        """Prepare a lease.

        Args:
            progress: called at each heartbeat, for what `status` shows.
            beat_s: seconds between heartbeats.
            dead_after_s: how long to watch the heartbeat of a driver on another machine.
        """
        self._folder = folder
        self.progress = progress
        """Called at each heartbeat; may be replaced while the lease is held."""
        self._beat_s = beat_s
        self._dead_after_s = dead_after_s
        self._me = Holder.of_this_process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self.lost = False
        """True once another driver has taken the lease: this driver must stop."""

    def __enter__(self) -> Lease:
        self._refuse_while_held()
        self._write(0)
        # Of two drivers that start together the last to write wins; the other finds out here.
        if not self._is_mine():
            self._refuse_while_held()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        # When the store fails now, the lease stays, as that of a driver that has died.
        with contextlib.suppress(OSError):
            if not self.lost and self._is_mine():
                self._folder.delete(LEASE)

    def _refuse_while_held(self) -> None:
        """Raise OutputInUse when another driver holds the lease and lives."""
        holder = read_holder(self._folder)
        if holder is None or holder.token == self._me.token or holder.is_known_dead:
            return
        if holder.is_on_this_machine or self._beats(holder):
            raise OutputInUse(
                f"output must have one driver at a time, got {self._folder} while {holder} works on it; "
                "wait for it, stop it, or give another --output"
            )

    def _beats(self, holder: Holder) -> bool:
        """Watch a driver of another machine until its heartbeat changes or it must be dead."""
        deadline = time.monotonic() + self._dead_after_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s / 2))
            now = read_holder(self._folder)
            if now is None:
                return False
            if (now.token, now.beat) != (holder.token, holder.beat):
                return True
        return False

    def _keep_beating(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            beat += 1
            try:
                if not self._is_mine():
                    self.lost = True
                    return
                self._write(beat)
            except OSError:
                # A store that fails for a while costs heartbeats, not the run.
                continue

    def _is_mine(self) -> bool:
        holder = read_holder(self._folder)
        return holder is not None and holder.token == self._me.token

    def _write(self, beat: int) -> None:
        holder = asdict(self._me) | {"beat": beat, "progress": self.progress()}
        self._folder.put(LEASE, json.dumps(holder).encode())


def _machine() -> str:
    """Return a name for this boot of the machine and this process namespace, or "" when Linux has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Return when a process started, in ticks since boot, or None when it does not run."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name in brackets may contain spaces; the start time is the 20th field after it.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
