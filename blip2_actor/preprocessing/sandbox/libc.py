"""Calls of Linux for which Python has no function."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

SET_NO_NEW_PRIVS = 38
"""For `prctl` (include/uapi/linux/prctl.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int) -> None:
    """Call prctl(2).

    Raises:
        OSError: the kernel has refused it, or is not Linux.
    """
    _require_linux()
    _checked(_libc.prctl(option, ctypes.c_ulong(argument), *[ctypes.c_ulong(0)] * 3))


def system_call(number: int, *arguments: int | ctypes.Structure | None) -> int:
    """Make a system call; a structure is passed by its address, None as a null pointer.

    Raises:
        OSError: the kernel has refused it, does not know it (ENOSYS), or is not Linux.
    """
    _require_linux()
    passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else ctypes.c_void_p(a) for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *passed))


def _require_linux() -> None:
    if sys.platform != "linux":  # there, the same numbers are other calls
        raise OSError(errno.ENOSYS, f"this is {sys.platform}, not Linux")


def _checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
