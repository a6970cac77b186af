"""Contenders in processes of their own, as people run them: neither's threads disturb the other's.

OpenMP keeps a pool of threads per thread that computes, and lets pools sleep between two operations where
together they have more threads than the machine has cores. Two contenders in one process would both lose.
"""

from __future__ import annotations

import multiprocessing
import resource
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Contender:
    """An object that lives in a child process; `call` runs a method there and waits for it."""

    def __init__(self, make: Callable[..., Any], *args: Any, threads: int | None = None) -> None:
        """
        Args:
            make: a picklable class or function; its arguments follow.
            threads: CPU threads of torch in the child; None leaves torch's own choice.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, make, args, threads), daemon=True)
        self._process.start()
        far.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._receive()

    def close(self) -> float:
        """End the process; its peak memory in GiB, of the GPU where it computed on one."""
        peak_memory_gib: float = self.call("")
        self._process.join()
        return peak_memory_gib

    def _receive(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"a contender has died (exit code {self._process.exitcode})") from None
        if error is not None:
            raise RuntimeError(f"a contender has failed:\n{error}")
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
