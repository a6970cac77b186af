"""An engine belongs to the process that built it: its threads do not exist in any other one."""

from __future__ import annotations

import os

CANNOT_BE_SENT = "an engine cannot be sent to another process; send its configuration, and build it there"
"""Message of the error when an engine is pickled."""


class OwnProcess:
    """The process that made this object, and so the engine that holds it."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_current(self) -> bool:
        """False in a forked child, where every lock may be held for ever."""
        return os.getpid() == self._id

    def require_current(self) -> None:
        """Refuse a call in a forked child, which would wait for ever for a thread that it does not have.

        Raises:
            RuntimeError: another process calls.
        """
        if not self.is_current:
            raise RuntimeError(
                f"the engine must be used in the process that built it ({self._id}), got a call in its "
                f"forked child ({os.getpid()}); build an engine there, or give a DataLoader num_workers=0"
            )
