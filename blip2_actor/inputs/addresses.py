"""Addresses and hosts of the network: which are public, and how a host is written to be compared."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's service for its virtual machines, at an address that looks public
        "192.0.0.0/24",  # Oracle's metadata service is 192.0.0.192; Python before 3.11.10 calls it public
        "64:ff9b:1::/48",  # translation to private IPv4 addresses (RFC 8215)
    )
]
_IPV4_INSIDE = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that a gateway translates to the IPv4 address in their last 32 bits (RFC 6052)."""


def is_public(address: Address) -> bool:
    """Return True for an address of the public internet, or a public IPv4 address inside one of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if inside is None and address in _IPV4_INSIDE:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(inside)
        if address.is_site_local:
            return False
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def plain_host(host: str) -> str:
    """Return a host as it is compared and resolved; raises UnicodeError if it cannot be one."""
    host = host.lower().rstrip(".")
    return host if is_address(host) else host.encode("idna").decode("ascii").lower()


def is_address(host: str) -> bool:
    """Return True if a host is an address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
