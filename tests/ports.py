"""Ports for servers that a test starts."""

from __future__ import annotations

import random
import socket


def free_ports(count: int) -> list[int]:
    """Return ports that are free, and that no connection or Ray worker is given in the meantime.

    They lie between those that Ray gives its workers and those that Linux gives connections.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20_000, 32_767)
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


def free_port() -> int:
    """Return one port of `free_ports`."""
    return free_ports(1)[0]
