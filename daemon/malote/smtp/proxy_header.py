"""The PROXY protocol, versions 1 and 2: the address of the client behind a proxy, in front of the first byte of SMTP or TLS.

Specification: "The PROXY protocol" by Willy Tarreau, as haproxy ships it (doc/proxy-protocol.txt). Read only from peers that the
configuration lists. No byte after the header is taken from the socket: with TLS it is the handshake that follows.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address

from malote.smtp.networks import parse_address

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
MAX_V1 = 107                # section 2.1
MAX_V2_REST = 2048          # section 2.2 allows 65535; addresses take 216 at most, a certificate's names the rest

_V1 = re.compile(rb"PROXY (TCP[46]) ([0-9A-Fa-f:.]{2,39}) ([0-9A-Fa-f:.]{2,39}) (\d{1,5}) (\d{1,5})\r\n")
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")
_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED, _TCP4, _TCP6, _UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
_ADDRESS_BYTES = {_UNSPECIFIED: 0, _TCP4: 12, _TCP6: 36, _UNIX_STREAM: 216}
_PP2_TYPE_CRC32C = 0x03
_PP2_TYPE_SSL = 0x20
_PP2_CLIENT_SSL = 0x01


class ProxyFault(Exception):
    """No header, or a wrong one: the connection cannot be used."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from, as its proxy says. `address` "": the proxy does not know."""

    address: str = ""
    local: bool = False     # the proxy's own connection, to see whether we are there
    tls: bool = False       # the client speaks TLS with the proxy


def parse_v1(line: bytes) -> Origin:
    """Raises `ProxyFault`."""
    if _V1_UNKNOWN.fullmatch(line):
        return Origin()
    match = _V1.fullmatch(line)
    if match is None or int(match[4]) > 65535 or int(match[5]) > 65535:
        raise ProxyFault("a first line that is no PROXY header")
    version = 4 if match[1] == b"TCP4" else 6
    try:
        addresses = [ip_address(each.decode()) for each in (match[2], match[3])]
    except ValueError:
        raise ProxyFault("an address that is none") from None
    if any(address.version != version for address in addresses):
        raise ProxyFault("an address of the other kind")
    return Origin(str(parse_address(str(addresses[0]))))


def parse_v2(command: int, family: int, rest: bytes) -> Origin:
    """From bytes 13 and 14 of the header, and all from byte 17 on. Raises `ProxyFault`."""
    if command == _LOCAL:       # section 2.2: whatever else it says is to be passed over
        return Origin(local=True)
    if command != _PROXY:
        raise ProxyFault("another version, or another command")
    size = _ADDRESS_BYTES.get(family)
    if size is None:
        raise ProxyFault("another protocol than TCP")
    if len(rest) < size:
        raise ProxyFault("too short for the addresses")
    tls = _speaks_tls(rest[size:])
    if family == _TCP4:
        return Origin(str(ip_address(rest[:4])), tls=tls)
    if family == _TCP6:
        return Origin(str(parse_address(str(ip_address(rest[:16])))), tls=tls)
    return Origin(tls=tls)


def _speaks_tls(fields: bytes) -> bool:
    """Section 2.2.6, PP2_TYPE_SSL. Raises `ProxyFault` if the fields do not end where the header does."""
    tls = False
    while fields:
        if len(fields) < 3 or len(fields) < 3 + (length := struct.unpack("!H", fields[1:3])[0]):
            raise ProxyFault("a field that is cut off")
        if fields[0] == _PP2_TYPE_SSL and length >= 5:
            tls = bool(fields[3] & _PP2_CLIENT_SSL)
        fields = fields[3 + length:]
    return tls


def crc32c(data: bytes) -> int:
    """RFC 3720 appendix B.4. By the bit: a header has some hundred bytes, and few proxies add the sum."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def check_sum(header: bytes, fields_at: int) -> None:
    """Section 2.2.4, PP2_TYPE_CRC32C: if it is there it must be right. `header`: all of it. Raises `ProxyFault`."""
    while len(header) >= fields_at + 3:
        kind, length = struct.unpack_from("!BH", header, fields_at)
        value_at, fields_at = fields_at + 3, fields_at + 3 + length
        if kind == _PP2_TYPE_CRC32C:
            zeroed = header[:value_at] + bytes(length) + header[fields_at:]
            if header[value_at:fields_at] != crc32c(zeroed).to_bytes(4):
                raise ProxyFault("a wrong checksum")


async def read_proxy_header(sock: socket.socket) -> Origin:
    """Take the header, and nothing after it, from a non-blocking socket. Raises `ProxyFault`, `OSError`."""
    first = await _exactly(sock, len(SIGNATURE))
    if first == SIGNATURE:
        command, family, length = struct.unpack("!BBH", await _exactly(sock, 4))
        if length > MAX_V2_REST:
            raise ProxyFault("too long")
        rest = await _exactly(sock, length)
        origin = parse_v2(command, family, rest)
        if not origin.local:
            check_sum(first + struct.pack("!BBH", command, family, length) + rest, 16 + _ADDRESS_BYTES[family])
        return origin
    if not first.startswith(b"PROXY "):
        raise ProxyFault("a first line that is no PROXY header")
    line = first
    while not line.endswith(b"\r\n"):
        if len(line) >= MAX_V1 or b"\n" in line:
            raise ProxyFault("a first line that is no PROXY header")
        line += await _exactly(sock, 1)     # one by one: what follows the line is not ours to take
    return parse_v1(line)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        piece = await loop.sock_recv(sock, size - len(data))
        if not piece:
            raise ProxyFault("cut off")
        data += piece
    return data
