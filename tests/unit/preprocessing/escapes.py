"""Attempts of an attacker's code in a decoding child; each raises OSError if it is refused.

As a program, it makes some attempts under one protection each, and prints their outcomes as JSON:

    python escapes.py '["Landlock"]' '[["open_file", "/etc/passwd"]]'
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_PTRACE_SEIZE = 0x4206


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _check(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def open_file(path: str) -> None:
    os.open(path, os.O_RDONLY)


def list_folder(path: str) -> None:
    os.listdir(path)


def create_file(path: str) -> None:
    os.open(path, os.O_WRONLY | os.O_CREAT)


def delete_file(path: str) -> None:
    os.unlink(path)


def connect(port: str) -> None:
    socket.socket().connect(("127.0.0.1", int(port)))


def connect_unix(name: str) -> None:
    socket.socket(socket.AF_UNIX).connect("\0" + name)


def signal_parent() -> None:
    os.kill(os.getppid(), 0)


def signal_group() -> None:
    os.kill(0, signal.SIGCONT)


def trace_parent() -> None:
    _check(_libc.ptrace(_PTRACE_SEIZE, os.getppid(), None, None))


def read_memory_of_parent() -> None:
    byte = ctypes.create_string_buffer(1)
    here = _Vector(ctypes.cast(byte, ctypes.c_void_p), 1)
    there = _Vector(1 << 20, 1)  # an unused address fails with EFAULT if the call is allowed
    _check(_libc.process_vm_readv(os.getppid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0))


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def execute(program: str) -> None:
    os.execv(program, [program])


def become_root() -> None:
    os.setresuid(0, 0, 0)


def raise_limits() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    except ValueError as error:  # what Python raises for EPERM
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from error


def gain_privileges() -> None:
    get_no_new_privs = 39
    if _libc.prctl(get_no_new_privs, 0, 0, 0, 0) == 1:
        raise PermissionError(errno.EPERM, "")


def need_variable(name: str) -> None:
    if name not in os.environ:
        raise OSError(0, f"no variable {name}")


def need_descriptor(fd: str) -> None:
    os.lseek(int(fd), 0, os.SEEK_CUR)


ESCAPES = {
    escape.__name__: escape
    for escape in (
        open_file,
        list_folder,
        create_file,
        delete_file,
        connect,
        connect_unix,
        signal_parent,
        signal_group,
        trace_parent,
        read_memory_of_parent,
        fork,
        execute,
        become_root,
        raise_limits,
        gain_privileges,
        need_variable,
        need_descriptor,
    )
}


def main() -> None:
    from blip2_actor.preprocessing.sandbox import protections

    names, attempts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    protections.PROTECTIONS = {name: protections.PROTECTIONS[name] for name in names}
    report = protections.close_sandbox()
    outcomes = {}
    for name, *arguments in attempts:
        try:
            ESCAPES[name](*arguments)
            outcomes[name] = "done"
        except OSError as error:
            outcomes[name] = os.strerror(error.errno or 0)
    print(json.dumps({"missing": report.not_in_force, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
