"""The lease: one driver per output folder, the second is refused with the name of the first.

A driver proves that it lives by its heartbeat, which changes; clocks of two machines are never
compared. On the same machine a dead driver is known at once, so that running the same command
again after a kill does not wait.
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
from pipeline.storage.folder import Folder

LEASE = "_blip2/lease.json"
BEAT_S = 5.0
"""Seconds between heartbeats."""
DEAD_AFTER_S = 30.0
"""A heartbeat that stands still for this long is that of a dead driver."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    token: str
    host: str
    machine: str
    """Boot and process namespace: where equal, the process can be looked up."""
    pid: int
    process_start: str
    """When the process started, in the machine's ticks: a process id may be given again."""
    started: str
    beat: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    """What the driver last said about its work, for `status`."""

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
        """True when its process is gone for certain; False also when nothing can be known."""
        return self.is_on_this_machine and _process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def read_holder(folder: Folder) -> Holder | None:
    content = folder.get(LEASE)
    return Holder(**json.loads(content)) if content else None


class Lease:
    """Held between `with Lease(...)` and its end, with a thread that beats."""

    def __init__(
        self,
        folder: Folder,
        progress: Callable[[], dict[str, Any]] = dict,
        beat_s: float = BEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._beat_s = beat_s
        self._dead_after_s = dead_after_s
        self._me = Holder.of_this_process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self.lost = False
        """True once another driver has taken the lease: this one must stop."""

    def __enter__(self) -> Lease:
        self._refuse_while_held()
        self._write(0)
        # Of two drivers that start together the last writer wins, and the other sees it here.
        if not self._is_mine():
            self._refuse_while_held()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        # One that a bad spell of the store leaves behind is that of a dead driver.
        with contextlib.suppress(OSError):
            if not self.lost and self._is_mine():
                self._folder.delete(LEASE)

    def _refuse_while_held(self) -> None:
        holder = read_holder(self._folder)
        if holder is None or holder.token == self._me.token or holder.is_known_dead:
            return
        if holder.is_on_this_machine or self._beats(holder):
            raise OutputInUse(
                f"output must have one driver at a time, got {self._folder} while {holder} works on it; "
                "wait for it, stop it, or give another --output"
            )

    def _beats(self, holder: Holder) -> bool:
        """Watch a holder of another machine until it beats or must be dead."""
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
                # A store that answers badly for a while costs beats, not the run.
                continue

    def _is_mine(self) -> bool:
        holder = read_holder(self._folder)
        return holder is not None and holder.token == self._me.token

    def _write(self, beat: int) -> None:
        holder = asdict(self._me) | {"beat": beat, "progress": self._progress()}
        self._folder.put(LEASE, json.dumps(holder).encode())


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name in brackets may hold spaces; start time is the 20th field after it.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
