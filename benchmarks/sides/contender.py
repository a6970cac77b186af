"""Run each contender in its own process, as users do, so that their threads do not disturb each other.

OpenMP keeps a pool of threads for each thread that computes. If the pools together have more threads than the
machine has cores, they sleep between two operations. Two contenders in one process would both be slower.
"""

from __future__ import annotations

import multiprocessing
import re
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class Contender:
    """An object in a child process; `call` runs one of its methods there and waits for the result."""

    def __init__(self, make: Callable[..., Any], *args: Any, threads: int | None = None) -> None:
        """Start the process and create the object.

        Args:
            make: a picklable class or function that creates the object.
            args: its arguments.
            threads: CPU threads of torch in the child; None keeps torch's own choice.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, make, args, threads), daemon=True)
        self._process.start()
        far.close()
        self._receive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._receive()

    def close(self) -> float:
        """End the process; return its peak memory in GiB, on the GPU if it computed on one."""
        peak_memory_gib: float = self.call("")
        self._process.join()
        return peak_memory_gib

    def _receive(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"a contender died (exit code {self._process.exitcode})") from None
        if error is not None:
            raise RuntimeError(f"a contender failed:\n{error}")
        return value


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...], threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        contender = make(*args)
        pipe.send((None, None))
        while True:
            method, args = pipe.recv()
            if not method:
                pipe.send((_peak_memory_gib(), None))
                return
            value = getattr(contender, method)(*args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send((value, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def _peak_memory_gib() -> float:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_mib() / 2**10


def peak_mib() -> float:
    """Return the peak memory of this process; `getrusage` would include that of its parent at the start."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 2**10
