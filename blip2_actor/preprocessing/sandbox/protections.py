"""Close the sandbox: give up, one by one, everything that decoding does not need.

The rule: each protection is tried on its own, and what is not in force is reported, because kernels and
containers lack some of them. Several cover the same, so that one that is missing opens little. Close the
sandbox after all imports, because files cannot be opened any more, and before the first untrusted byte.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

from blip2_actor.preprocessing.sandbox import landlock, seccomp
from blip2_actor.preprocessing.sandbox.libc import SET_NO_NEW_PRIVS, prctl

NOBODY = 65534
"""User and group of a process that owns nothing."""

_CAP_KILL = 5


@dataclass(frozen=True)
class SandboxReport:
    """What a decoding child can no longer do."""

    restrictions: tuple[str, ...] = ()
    """What all protections together achieve, such as "no files"."""
    in_force: tuple[str, ...] = ()
    """The protections that are in force."""
    not_in_force: tuple[str, ...] = ()
    """The others, each with the reason."""

    def __str__(self) -> str:
        missing = f"; not in force: {', '.join(self.not_in_force)}" if self.not_in_force else ""
        return f"decode sandbox: {', '.join(self.restrictions) or 'none'}{missing}"


def close_sandbox() -> SandboxReport:
    """Close the sandbox around this process, for ever, and return what is in force."""
    restrictions: list[str] = []
    in_force, not_in_force = [], []
    for name, protect in PROTECTIONS.items():
        try:
            restrictions += protect()
            in_force.append(name)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            not_in_force.append(f"{name} ({reason})")
    return SandboxReport(tuple(dict.fromkeys(restrictions)), tuple(in_force), tuple(not_in_force))


def _change_user() -> tuple[str, ...]:
    """Become `NOBODY` without groups; ValueError if this process may not, or its parent could not end it."""
    if os.geteuid() != 0:
        raise ValueError(f"started by uid {os.geteuid()}, not by root")
    if not _effective_capabilities() >> _CAP_KILL & 1:
        raise ValueError("root lacks CAP_KILL, and could not end a process of another user")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return (f"uid {NOBODY}",)


def _effective_capabilities() -> int:
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)


def _refuse_new_privileges() -> tuple[str, ...]:
    prctl(SET_NO_NEW_PRIVS, 1)
    return ("no new privileges",)


def _refuse_new_descriptors() -> tuple[str, ...]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    return "no files", "no network"


PROTECTIONS: dict[str, Callable[[], tuple[str, ...]]] = {
    "another user": _change_user,
    "no new privileges": _refuse_new_privileges,
    "Landlock": landlock.restrict,
    "no new file descriptors": _refuse_new_descriptors,
    "seccomp": seccomp.restrict,
}
"""Each returns what it achieves. In this order: Landlock and seccomp need that new privileges are given up,
and Landlock needs a file descriptor."""
