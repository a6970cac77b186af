"""The lease: one driver per output folder; a second driver is refused, with the name of the first.

Several drivers may work on slices of one run. Each slice has a lease, and no shard is in two slices that are
worked on: slices of another division are refused, and so is a driver for the whole run.

A driver shows that it lives by its heartbeat, a number that changes. Taking a lease never compares the clocks
of two machines. On the same machine a dead driver is recognized at once, so that running the command again
after a kill does not wait.

A driver that was suspended may go on after another has taken its shards. It finds its lease gone at its next
heartbeat, and starts no commit before that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import OutputInUse
from pipeline.inputs.shards import RunSlice
from pipeline.ledger.layout import LEASE, SLICE_LEASES, lease_name, parse_lease_name
from pipeline.storage.folder import Folder
from pipeline.storage.retrying import retry_on_oserror

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between heartbeats."""
DEAD_AFTER_S = 30.0
"""A driver whose heartbeat does not change for this long is dead."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine is suspended


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
    run: str = ""
    """Id of the run; empty in leases of older versions, and of commands that run nothing."""
    beat: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    """The last progress of the driver, for `status`."""

    @classmethod
    def of_this_process(cls, run: str = "") -> Holder:
        pid = os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            process_start=_process_start(pid) or "",
            started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            run=run,
        )

    @property
    def is_on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_known_dead(self) -> bool:
        """True if the process has certainly ended; False if it runs, or that cannot be known."""
        return self.is_on_this_machine and _process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def read_holder(folder: Folder, name: str = LEASE, num_tries: int = 3) -> Holder | None:
    """Return the driver that holds a lease, dead or alive, or None.

    Raises:
        ValueError: the lease is damaged, or of a newer version.
    """
    if not (content := folder.get(name)):
        return None
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError) as error:
        if num_tries > 1:  # Arrow may read the size of one heartbeat and the content of the next.
            return read_holder(folder, name, num_tries - 1)
        raise ValueError(
            f"the lease {name} in {folder} must be one that this version can read, got {content[:80]!r}: "
            f"{error}; delete the file if no driver works on this output"
        ) from error


def read_holders(folder: Folder) -> dict[str, Holder]:
    """Return the drivers that hold the lease of the run or of a slice, by the name of the lease."""
    names = [LEASE, *sorted(folder.names(SLICE_LEASES))]
    return {name: holder for name in names if (holder := read_holder(folder, name)) is not None}


def driver_at_work(folder: Folder) -> Holder | None:
    """Return a driver that holds a lease, unless it has died, or has sent no heartbeat for long."""
    for name, holder in read_holders(folder).items():
        silent_s = folder.seconds_since_write(name)
        may_send = holder.is_on_this_machine or silent_s is None or silent_s < DEAD_AFTER_S
        if may_send and not holder.is_known_dead:
            return holder
    return None


class Lease:
    """The lease of this process, held inside `with Lease(...)`; a thread sends the heartbeats.

    Its folder must not retry: a heartbeat that waits for the store looks like a dead driver.
    """

    def __init__(
        self,
        folder: Folder,
        run_slice: RunSlice | None = None,
        beat_s: float = BEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
        run: str = "",
    ) -> None:
        """Prepare a lease.

        Args:
            run_slice: the part of the run that is worked on; None means all of it.
            beat_s: seconds between heartbeats.
            dead_after_s: how long to watch the heartbeat of a driver on another machine.
            run: id of the run, for readers of the lease.
        """
        self._folder, self._slice, self._name = folder, run_slice, lease_name(run_slice)
        self._dead: set[str] = set()
        self.progress: Callable[[], dict[str, Any]] = dict
        """Called at each heartbeat, for what `status` shows; may be replaced while the lease is held."""
        self._beat_s, self._dead_after_s = beat_s, dead_after_s
        self._me = Holder.of_this_process(run)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._confirmed = 0.0  # start of the last successful heartbeat
        self.lost = False
        """True once another driver has taken the lease: this driver must stop."""

    @property
    def is_certain(self) -> bool:
        """Whether no other driver can have taken the lease, because the last heartbeat is recent."""
        return not self.lost and time.clock_gettime(_CLOCK) < self._confirmed + self._dead_after_s

    def require(self) -> None:
        """Raise OutputInUse if another driver has taken the lease; look if that is possible."""
        if self.lost or not (self.is_certain or retry_on_oserror(self._is_mine)):
            self.lost = True
            raise self.taken()

    def taken(self) -> OutputInUse:
        """Return the error that ends a driver whose lease is lost."""
        return OutputInUse(f"another driver has taken the lease of {self._folder}, or it was deleted")

    def __enter__(self) -> Lease:
        self._refuse_while_held()
        self._confirmed = time.clock_gettime(_CLOCK)
        self._take()
        self._thread.start()
        # Two drivers, one for a slice and one for the whole run, may start together: each sees the heartbeat
        # of the other, and both may stop. In a store without conditional writes, the last to write wins.
        try:
            self._refuse_while_held()
            self._delete_dead()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        # If the store fails now, the lease stays, like that of a driver that has died.
        with contextlib.suppress(OSError):
            if not self.lost and self._is_mine():
                self._folder.delete(self._name)

    def _take(self) -> None:
        """Write the lease; raise OutputInUse if another driver has taken it meanwhile."""
        if self._folder.put_new(self._name, self._content(0)):
            return
        if (holder := read_holder(self._folder, self._name)) is not None and self._may_live(holder):
            raise self._in_use(holder)
        self._write(0)

    def _refuse_while_held(self) -> None:
        """Raise OutputInUse if another living driver works on the same shards.

        Drivers on other machines are watched together until a heartbeat changes or all count as dead.
        """
        watched = {name: holder for name, holder in self._others().items() if self._may_live(holder)}
        here = next((holder for holder in watched.values() if holder.is_on_this_machine), None)
        if here is not None:
            raise self._in_use(here)
        deadline = time.monotonic() + self._dead_after_s
        while watched and time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s / 2))
            for name, holder in list(watched.items()):
                now = read_holder(self._folder, name)
                if now is None:
                    del watched[name]
                elif (now.token, now.beat) != (holder.token, holder.beat):
                    raise self._in_use(holder)
        self._dead |= {holder.token for holder in watched.values()}

    def _delete_dead(self) -> None:
        """Delete the leases of dead drivers for our shards: one that wakes up must see that it has none."""
        for name, holder in self._others().items():
            if not self._may_live(holder) and name != self._name:
                self._folder.delete(name)

    def _others(self) -> dict[str, Holder]:
        """Return the holders of leases for any of our shards, including former holders of ours."""
        holders = read_holders(self._folder)
        return {name: holder for name, holder in holders.items() if self._overlaps(parse_lease_name(name))}

    def _may_live(self, holder: Holder) -> bool:
        """Return whether a holder is another driver that is not known to be dead."""
        return holder.token not in {self._me.token, *self._dead} and not holder.is_known_dead

    def _in_use(self, holder: Holder) -> OutputInUse:
        return OutputInUse(
            f"output must have one driver at a time, got {self._folder} while {holder} works on it; "
            "wait for it, stop it, or give another --output"
        )

    def _overlaps(self, other: RunSlice | None) -> bool:
        """Return whether a driver for that slice, or for the whole run, may work on our shards."""
        if self._slice is None or other is None:
            return True
        return other == self._slice or other.total != self._slice.total

    def _keep_beating(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            beat += 1
            begun = time.clock_gettime(_CLOCK)
            try:
                if not self._is_mine():
                    self.lost = True
                    return
                self._write(beat)
                self._confirmed = begun
            except OSError:
                pass  # A store that fails for a while costs heartbeats, not the run.
            except Exception:  # Without this thread, the driver looks dead.
                logger.exception("The heartbeat of %s has failed", self._name)

    def _is_mine(self) -> bool:
        content = self._folder.get(self._name)
        try:
            return content is not None and json.loads(content)["token"] == self._me.token
        except (ValueError, TypeError, KeyError):
            # Nobody else holds a damaged lease: the next heartbeat repairs it.
            return True

    def _write(self, beat: int) -> None:
        self._folder.put(self._name, self._content(beat))

    def _content(self, beat: int) -> bytes:
        return json.dumps(asdict(self._me) | {"beat": beat, "progress": self.progress()}).encode()


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
