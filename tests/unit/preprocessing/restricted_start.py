"""The real decoding child on a machine with a kernel, container or user that lacks something.

python restricted_start.py LACKING SIZE_PX LIMITS_AS_JSON
"""

from __future__ import annotations

import errno
import os
import platform
import sys

from blip2_actor.preprocessing import decode_child
from blip2_actor.preprocessing.sandbox import seccomp
from blip2_actor.preprocessing.sandbox.libc import SET_NO_NEW_PRIVS, prctl, system_call

_DROP_FROM_BOUNDING_SET = 24
_NUM_CAPABILITIES = 41


def lose_the_kernels_sandboxes() -> None:
    """Make seccomp and Landlock fail as in kernels without them, with a filter that allows all else."""
    number_of_seccomp = seccomp.ARCHITECTURES[platform.machine()].seccomp
    instructions = [(seccomp._LOAD, 0, 0, seccomp._CALL)]
    for call in (number_of_seccomp, 444, 445, 446):
        instructions += [
            (seccomp._JUMP_IF_EQUAL, 0, 1, call),
            (seccomp._RETURN, 0, 0, seccomp._FAIL | errno.ENOSYS),
        ]
    instructions.append((seccomp._RETURN, 0, 0, seccomp._ALLOW))
    program = seccomp.program_of(instructions)
    prctl(SET_NO_NEW_PRIVS, 1)
    system_call(number_of_seccomp, 1, 0, program)


def lose_root() -> None:
    """Become a user without any rights, as in most containers."""
    os.setgroups([])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)


def lose_capabilities() -> None:
    """Stay root but lose its capabilities, as in a container that drops all of them."""
    for capability in range(_NUM_CAPABILITIES):
        prctl(_DROP_FROM_BOUNDING_SET, capability)
    command = [sys.executable, "-P", "-m", "blip2_actor.preprocessing.decode_child", *sys.argv[1:]]
    os.execv(sys.executable, command)  # the exec removes the capabilities


if __name__ == "__main__":
    decode_child.prepare_for_sandbox()  # another user may not be able to read the files
    globals()[sys.argv.pop(1)]()
    decode_child.main()
