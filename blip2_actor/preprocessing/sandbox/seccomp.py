"""Seccomp: the kernel refuses a process every system call but those that decoding needs.

What is left works on memory, time, the process's own threads and signals, and on pipes that are open already.
Everything else, known or new, fails with EPERM: there are no files, no sockets, no other processes, no
programs, and no kernel interfaces such as io_uring or bpf.

The filter is a program of classic BPF (https://docs.kernel.org/userspace-api/seccomp_filter.html). The kernel
remembers which calls the filter always allows, so that they cost nothing (since Linux 5.11).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from blip2_actor.preprocessing.sandbox.libc import system_call

_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_CLONE_THREAD = 0x10000
_FIRST_OF_X32 = 0x40000000
"""System calls of another interface on the same architecture start here."""

# Instructions of BPF and offsets into `struct seccomp_data`, of which the low half of an argument is read.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _JUMP_IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL, _ARCHITECTURE, _ARGUMENT_0 = 0, 4, 16
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000


@dataclass(frozen=True)
class Architecture:
    """System calls of one architecture, by their numbers."""

    audit_number: int
    """AUDIT_ARCH_ of include/uapi/linux/audit.h."""
    seccomp: int
    clone: int
    kill: int
    tgkill: int
    allowed: tuple[int, ...]
    """Calls that are allowed with any arguments."""


_CLONE3 = 435

_ALLOWED = (
    ("read", 0, 63),
    ("write", 1, 64),
    ("readv", 19, 65),
    ("writev", 20, 66),
    ("close", 3, 57),
    ("lseek", 8, 62),
    ("fstat", 5, 80),
    ("brk", 12, 214),
    ("mmap", 9, 222),
    ("munmap", 11, 215),
    ("mremap", 25, 216),
    ("mprotect", 10, 226),
    ("madvise", 28, 233),
    ("futex", 202, 98),
    ("set_robust_list", 273, 99),
    ("rseq", 334, 293),
    ("membarrier", 324, 283),
    ("sched_yield", 24, 124),
    ("sched_getaffinity", 204, 123),
    ("getcpu", 309, 168),
    ("exit", 60, 93),
    ("exit_group", 231, 94),
    ("getpid", 39, 172),
    ("gettid", 186, 178),
    ("rt_sigaction", 13, 134),
    ("rt_sigprocmask", 14, 135),
    ("rt_sigreturn", 15, 139),
    ("sigaltstack", 131, 132),
    ("restart_syscall", 219, 128),
    ("setitimer", 38, 103),
    ("getitimer", 36, 102),
    ("clock_gettime", 228, 113),
    ("clock_getres", 229, 114),
    ("clock_nanosleep", 230, 115),
    ("nanosleep", 35, 101),
    ("gettimeofday", 96, 169),
    ("time", 201, None),
    ("times", 100, 153),
    ("getrusage", 98, 165),
    ("getrandom", 318, 278),
)
"""Calls that are allowed with any arguments: name, number on x86-64, number on aarch64 (None: not there)."""

ARCHITECTURES = {
    "x86_64": Architecture(
        audit_number=0xC000003E,
        seccomp=317,
        clone=56,
        kill=62,
        tgkill=234,
        allowed=tuple(number for _, number, _ in _ALLOWED),
    ),
    "aarch64": Architecture(
        audit_number=0xC00000B7,
        seccomp=277,
        clone=220,
        kill=129,
        tgkill=131,
        allowed=tuple(number for _, _, number in _ALLOWED if number is not None),
    ),
}
"""Numbers of arch/x86/entry/syscalls/syscall_64.tbl and of include/uapi/asm-generic/unistd.h."""


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def restrict() -> tuple[str, ...]:
    """Give up all other system calls, in every thread; return what the process can no longer reach.

    Raises:
        OSError: the kernel has no seccomp, does not allow it, or is of another architecture.
    """
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"there is no filter for {platform.machine()}")
    program = program_of(list(_filter(architecture, os.getpid())))
    system_call(architecture.seccomp, _SET_MODE_FILTER, _ALL_THREADS, program)
    return "no files", "no network", "no other processes"


def program_of(instructions: list[tuple[int, int, int, int]]) -> ctypes.Structure:
    """Return `struct sock_fprog`.

    Args:
        instructions: each a code, the numbers of instructions to skip if true and if false, an operand.
    """
    packed = (_Instruction(*instruction) for instruction in instructions)
    return _Program(len(instructions), (_Instruction * len(instructions))(*packed))


def _filter(architecture: Architecture, pid: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the instructions of the filter, as `program_of` takes them."""
    yield _LOAD, 0, 0, _ARCHITECTURE
    yield _JUMP_IF_EQUAL, 1, 0, architecture.audit_number
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _CALL
    yield _JUMP_IF_AT_LEAST, 0, 1, _FIRST_OF_X32
    yield _RETURN, 0, 0, _FAIL | errno.EPERM
    for call in architecture.allowed:
        yield _JUMP_IF_EQUAL, 0, 1, call
        yield _RETURN, 0, 0, _ALLOW
    # Threads of this process are allowed (HEIC needs one), signals to this process too (abort needs one).
    for call, test, operand in (
        (architecture.clone, _JUMP_IF_ANY_BIT, _CLONE_THREAD),
        (architecture.kill, _JUMP_IF_EQUAL, pid),
        (architecture.tgkill, _JUMP_IF_EQUAL, pid),
    ):
        yield _JUMP_IF_EQUAL, 0, 4, call
        yield _LOAD, 0, 0, _ARGUMENT_0
        yield test, 0, 1, operand
        yield _RETURN, 0, 0, _ALLOW
        yield _RETURN, 0, 0, _FAIL | errno.EPERM
    # The flags of clone3 are in memory, which a filter cannot read; after ENOSYS, the C library uses clone.
    yield _JUMP_IF_EQUAL, 0, 1, _CLONE3
    yield _RETURN, 0, 0, _FAIL | errno.ENOSYS
    yield _RETURN, 0, 0, _FAIL | errno.EPERM
