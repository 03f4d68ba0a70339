"""The login that a client's own SASL messages name, for mechanisms that are passed through to the upstream server. Pure.

Only names are taken from the messages; passwords and tokens are handed on and kept nowhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

# Each has the login in the client's first message and needs no binding to the TLS channel, which is not the client's.
MECHANISMS = ("PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER")


def login_of(mechanism: str, message: bytes) -> str:
    """From the client's first message; "" if it names none, or acts for somebody else (RFC 4616: authzid differs)."""
    match mechanism:
        case "PLAIN":
            name = _plain(message)
        case "LOGIN":
            name = message
        case "XOAUTH2":
            name = _field(message.split(b"\x01"), b"user=")
        case "OAUTHBEARER":     # RFC 7628 3.1, RFC 5801 section 4: n,a=user,^A...
            name = _field(message.split(b"\x01", 1)[0].split(b","), b"a=").replace(b"=2C", b",").replace(b"=3D", b"=")
        case _:
            name = b""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _plain(message: bytes) -> bytes:
    parts = message.split(b"\0")
    if len(parts) != 3 or parts[0] not in (b"", parts[1]):
        return b""
    return parts[1]


def _field(parts: list[bytes], name: bytes) -> bytes:
    found = [part[len(name):] for part in parts if part.startswith(name)]
    return found[0] if len(found) == 1 else b""


class Listener:
    """Stands between the upstream's challenges and the client, and notes what the client says."""

    def __init__(self, mechanism: str, initial: bytes | None, ask: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        self._mechanism = mechanism
        self._ask = ask
        self._name = login_of(mechanism, initial) if initial is not None else ""
        self._messages = 0 if initial is None else 1

    @property
    def login(self) -> str:
        """"" unless the exchange had just the messages that the mechanism has. A server that passes over an initial response and
        asks for the name again would let the client name one login to us and another to it."""
        return self._name if self._messages == (2 if self._mechanism == "LOGIN" else 1) else ""

    async def answer(self, challenge: bytes) -> bytes | None:
        message = await self._ask(challenge)
        if message is not None:
            if not self._messages:
                self._name = login_of(self._mechanism, message)
            self._messages += 1
        return message
