"""Which ports a process and its descendants listen on, to be compared with what the documentation says."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import psutil


def listening_ports(pid: int) -> set[tuple[str, int]]:
    """Return the address and the number of each TCP port on which a process or a descendant listens."""
    root = psutil.Process(pid)
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in (root, *root.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_loopback
