"""The peak memory of a job's processes, by role."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

EVERY_S = 0.5
ROLES = ("ReadShard", "DecodeStage", "WriteStage", "Committer", "Coordinator")
"""Texts in the titles that Ray gives its workers."""


@contextmanager
def watch_memory() -> Iterator[dict[str, int]]:
    """Inspect this process and its descendants twice a second, inside a `with` block.

    Memory is a process's private memory, without the pages of Ray's object store, which all share.

    Yields:
        Peak MiB by role; if several processes share a role, that of the largest.
    """
    peak_mib: dict[str, int] = defaultdict(int)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(peak_mib, ended), daemon=True)
    thread.start()
    try:
        yield peak_mib
    finally:
        ended.set()
        thread.join()


def _watch(peak_mib: dict[str, int], ended: threading.Event) -> None:
    driver = psutil.Process()
    while not ended.wait(EVERY_S):
        for process in (driver, *driver.children(recursive=True)):
            with suppress(psutil.Error):  # it has ended
                title = " ".join(process.cmdline())
                memory = process.memory_info()
                for role in ["driver"] if process == driver else [role for role in ROLES if role in title]:
                    peak_mib[role] = max(peak_mib[role], (memory.rss - memory.shared) >> 20)
