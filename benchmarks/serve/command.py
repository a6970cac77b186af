"""`blip2 serve` in its own process, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil

from benchmarks.serve.processes import cpu_s_by_name, pss_bytes_by_name

READY_WITHIN_S = 120.0
SETTLED_AFTER_S = 10.0
"""Seconds after the start in which processes still release memory and import modules."""


def _free_port() -> int:
    """Return a free port that no connection or Ray process is given in the meantime."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise RuntimeError("no port from 20,000 to 32,767 is free")


class ServeCommand:
    """A running endpoint on a free port of this machine, without cached answers."""

    def __init__(self, flags: Sequence[str]) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: it has ended, or is not ready in time.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "serve", "--port", str(port), "--cache-bytes", "0", *flags],
            env=environment | {"RAY_TMPDIR": self._folder.name},
            stdout=subprocess.DEVNULL,
        )
        self.process = psutil.Process(self._process.pid)
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() - began > READY_WITHIN_S:
                self.close()
                raise RuntimeError("blip2 serve did not become ready")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - began

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def start(self) -> dict[str, Any]:
        """Return the time of the start, and its CPU time by process."""
        used = cpu_s_by_name(self.process)
        return {"ready_s": self.ready_s, "cpu_s": sum(used.values()), "cpu_s_by_process": _largest(used)}

    def at_rest(self, seconds: float) -> dict[str, Any]:
        """Return the memory of all processes, and the CPU time that they use while idle.

        Returns:
            MiB by process, and milliseconds of CPU time per second.
        """
        time.sleep(SETTLED_AFTER_S)
        before = cpu_s_by_name(self.process)
        time.sleep(seconds)
        after = cpu_s_by_name(self.process)
        used = {name: 1000 * (after[name] - before.get(name, 0)) / seconds for name in after}
        memory = {name: size / 2**20 for name, size in pss_bytes_by_name(self.process).items()}
        return {
            "pss_mib": sum(memory.values()),
            "cpu_ms_per_s": sum(used.values()),
            "pss_mib_by_process": _largest(memory),
            "cpu_ms_per_s_by_process": _largest(used),
        }

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)
        self._folder.cleanup()


def _largest(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures above zero, the largest first."""
    rows = sorted(figures.items(), key=lambda row: -row[1])
    return {name: round(figure, 2) for name, figure in rows if figure >= 0.005}
