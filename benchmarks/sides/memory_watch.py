"""The peak memory of a job's processes, by what they do."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import TracebackType

import psutil

EVERY_S = 0.5
ROLES = ("ReadShard", "DecodeStage", "WriteStage", "Committer", "Coordinator")
"""Texts in the titles that Ray gives its workers."""


class MemoryWatch:
    """Look at this process and at those that it has started twice a second, inside a `with` block.

    Memory is what a process has for itself, without the pages of Ray's object store, which all share.
    """

    def __init__(self) -> None:
        self.peak_mib: dict[str, int] = defaultdict(int)
        """By role; of several processes with one role, that of the largest."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.peak_mib = dict(self.peak_mib)

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._ended.wait(EVERY_S):
            self._note("driver", driver)
            for process in driver.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    for role in ROLES:
                        if role in title:
                            self._note(role, process)
                except psutil.Error:
                    pass  # It has ended.

    def _note(self, role: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        self.peak_mib[role] = max(self.peak_mib[role], (memory.rss - memory.shared) >> 20)
