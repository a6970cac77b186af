"""Notice devices that hang or fail, end their process, and count, so that a broken accelerator is left out.

The rule: an engine that has work and makes no progress for `step_timeout_s` hangs, and its process ends; an
engine that raises ends it too. Ray starts a new process and runs its calls again (`careful_replay`). A device
that fails `MAX_FAILURES` times without a row written in between is left out.

One image can make its process fail again and again, on any device. Therefore an image that runs alone counts
only once, so that it cannot reach the limit by itself; the small steps before do not count.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from blip2_actor import EngineStats
from pipeline.errors import Stopped

MAX_FAILURES = 3
FIRST_TIMES = 3
"""The first result may take this many times as long, because a model may be compiled first."""


@dataclass(frozen=True)
class Device:
    """The accelerators of one captioning actor, or the CPUs of its node if it has none."""

    node_id: str
    node: str
    ids: tuple[str, ...]
    """Ray's numbers of the accelerators on the node."""
    resource: str = "GPU"
    """The name of such accelerators in Ray."""

    @classmethod
    def of_this_worker(cls) -> Device:
        context = ray.get_runtime_context()
        held = {name: tuple(ids) for name, ids in context.get_accelerator_ids().items() if ids}
        resource, ids = next(iter(held.items()), ("GPU", ()))
        return cls(context.get_node_id(), os.uname().nodename, ids, resource)

    def __str__(self) -> str:
        return f"accelerator {', '.join(self.ids)} of {self.node}" if self.ids else f"the CPU of {self.node}"


class DeviceLeftOut(Stopped):
    """A device has failed several times; the run goes on without it, if others are left."""

    def __init__(self, device: Device) -> None:
        super().__init__(
            f"{device} has failed several times, and there is no other; finished work is kept; repair it and "
            "run the same command to resume"
        )
        self.device = device


@dataclass(frozen=True)
class DeviceFailure:
    """One failure of a device."""

    device: Device
    reason: str
    number: int
    """How often the device has failed without a row written in between."""

    @property
    def is_last(self) -> bool:
        """Whether the device should be left out from now on."""
        return self.number >= MAX_FAILURES


@dataclass
class DeviceFailures:
    """Counts the failures of all devices."""

    _counted: dict[Device, set[object]] = field(default_factory=dict)
    _new: list[DeviceFailure] = field(default_factory=list)

    def add(self, device: Device, reason: str, alone: object | None) -> None:
        """Count a failure.

        Args:
            alone: names the image that ran alone, if one did; each counts once.
        """
        counted = self._counted.setdefault(device, set())
        counted.add(object() if alone is None else alone)
        self._new.append(DeviceFailure(device, reason, len(counted)))

    def has_worked(self, device: Device) -> None:
        """Note that rows from a device have been written."""
        self._counted.pop(device, None)

    def take(self) -> list[DeviceFailure]:
        """Return the failures since the last call."""
        new, self._new = self._new, []
        return new


class Watchdog:
    """Calls a function when an engine has work and makes no progress for too long."""

    def __init__(
        self,
        stats: Callable[[], list[EngineStats]],
        timeout_s: float,
        on_hang: Callable[[str], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a watchdog; `start` starts its thread.

        Args:
            stats: returns the counters of the engines of this process.
            timeout_s: seconds without progress.
            on_hang: takes what is wrong, as one phrase.
        """
        self._stats, self._timeout_s, self._on_hang, self._clock = stats, timeout_s, on_hang, clock
        self._progress: list[tuple[int, int, int]] = []
        self._progress_at = clock()

    def start(self) -> None:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def check(self) -> None:
        """Compare the counters with those of the last check."""
        stats = self._stats()
        progress = [(s.num_finished, s.num_encode_calls, s.num_decode_steps) for s in stats]
        has_work = any(s.num_running + s.num_waiting for s in stats)
        limit_s = self._timeout_s * (1 if any(s.num_finished for s in stats) else FIRST_TIMES)
        now = self._clock()
        if progress != self._progress or not has_work:
            self._progress, self._progress_at = progress, now
        elif now - self._progress_at > limit_s:
            self._on_hang(f"no progress for {now - self._progress_at:.0f} s")

    def _run(self) -> None:
        while True:
            time.sleep(min(5.0, self._timeout_s / 4))
            self.check()
