"""Landlock: the kernel refuses files, TCP ports and signals to a process that gives them up.

The rules of a process can only become stricter, and children inherit them. Landlock came with Linux 5.13; its
version decides what it covers (https://docs.kernel.org/userspace-api/landlock.html).
"""

from __future__ import annotations

import ctypes
import os

from blip2_actor.preprocessing.sandbox.libc import system_call

# The same numbers on every architecture (include/uapi/asm-generic/unistd.h, include/uapi/linux/landlock.h).
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_QUERY_VERSION = 1

_NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files that each version knows; later versions have added none."""
_TCP_SINCE, _ALL_TCP_RIGHTS = 4, 0b11
_SIGNALS_SINCE, _ALL_SCOPES = 6, 0b11


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


def restrict() -> tuple[str, ...]:
    """Give up every right that Landlock covers; return what the process can no longer reach.

    Raises:
        OSError: the kernel has no Landlock, or it is switched off.
    """
    version = system_call(_CREATE_RULESET, None, 0, _QUERY_VERSION)
    rules = _Ruleset(handled_access_fs=(1 << _NUM_FILE_RIGHTS[min(version, max(_NUM_FILE_RIGHTS))]) - 1)
    if version >= _TCP_SINCE:
        rules.handled_access_net = _ALL_TCP_RIGHTS
    if version >= _SIGNALS_SINCE:
        rules.scoped = _ALL_SCOPES
    ruleset = system_call(_CREATE_RULESET, rules, ctypes.sizeof(rules), 0)
    try:
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return ("no files",)
