"""Names and listening ports of a process's descendants. Processes that end meanwhile are left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

import psutil


def listening_ports(pid: int) -> set[tuple[str, int]]:
    """Return the address and the number of each TCP port on which a process or a descendant listens."""
    root = psutil.Process(pid)
    ports = set()
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            ports |= {
                (connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    return ports


def titled_descendants(pid: int | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the title and the process of each descendant of a process, or of this one.

    The kernel truncates names but not titles, and Ray sets the titles of its workers.
    """
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        yield title, process


def descendant(part: str, pid: int | None = None) -> psutil.Process:
    """Return the first descendant of a process, or of this one, whose title has `part` in it."""
    for title, process in titled_descendants(pid):
        if part in title:
            return process
    raise AssertionError(f"no process of {part}")


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_loopback
