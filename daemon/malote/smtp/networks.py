"""Client addresses: the networks that a listener lists, and what counts as one client. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

UNIX = "unix"           # the peer of a UNIX socket, which has no address
UNKNOWN = "unknown"     # a client whose address its proxy does not know

Address = IPv4Address | IPv6Address

IPV6_CLIENT_BITS = 64   # what one client is given at least (RFC 6177); counting single addresses would count nothing


@lru_cache(maxsize=4096)        # the same clients come again and again; reading an address costs as much as a command
def parse_address(text: str) -> Address | None:
    """None for what is no address. A zone is dropped; an IPv4 address written as IPv6 (`::ffff:192.0.2.1`) is the IPv4 one."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_loopback(peer: str) -> bool:
    address = parse_address(peer)
    return address is not None and address.is_loopback


@lru_cache(maxsize=4096)
def client_key(peer: str) -> str:
    """What is counted as one client: an IPv4 address, the network of an IPv6 address. "" for those that are not counted."""
    address = parse_address(peer)
    if address is None:
        return ""
    if isinstance(address, IPv6Address):
        return str(ip_network((int(address) >> IPV6_CLIENT_BITS << IPV6_CLIENT_BITS, IPV6_CLIENT_BITS)))
    return str(address)


class Networks:
    """`peer in networks`. Made from names that config.py has checked: networks, addresses, `unix`."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(names)
        self._networks = tuple(ip_network(name) for name in self._names if name != UNIX)

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, peer: str) -> bool:
        if peer == UNIX:
            return UNIX in self._names
        address = parse_address(peer)
        return address is not None and any(address in network for network in self._networks)


NONE = Networks()
