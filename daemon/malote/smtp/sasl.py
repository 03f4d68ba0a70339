"""Logging in to the upstream server with configured credentials: one mechanism, one try (RFC 4954, 4616, 7628).

One try only, because each failure counts towards a lock-out. Secrets are in no repr, log line or error text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from malote.errors import Reply, UpstreamError, UpstreamRefused


@dataclass(frozen=True, slots=True)
class Credentials:
    """`token`: an OAuth 2 access token, used instead of a password."""

    username: str
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


class Authenticating(Protocol):
    """The part of `UpstreamConnection` that is needed here."""

    def auth_mechanisms(self) -> tuple[str, ...]: ...

    async def authenticate(self, mechanism: str, initial: bytes | None, challenge: Answerer) -> Reply: ...


class Answerer(Protocol):
    async def __call__(self, text: bytes, /) -> bytes | None: ...


_WITH_PASSWORD = ("PLAIN", "LOGIN")
_WITH_TOKEN = ("OAUTHBEARER", "XOAUTH2")


def choose_mechanism(offered: Sequence[str], wanted: str, *, token: bool) -> str:
    """The mechanism to use, in capitals. `wanted`: "auto" or a name from the configuration. Raises `UpstreamError`."""
    candidates = (_WITH_TOKEN if token else _WITH_PASSWORD) if wanted == "auto" else (wanted.upper(),)
    for name in candidates:
        if name in offered:
            return name
    raise UpstreamError(
        f"the next mail server offers no login with {' or '.join(candidates)}, only {', '.join(offered) or 'none at all'}",
        hint="set upstream.auth, or upstream.password_file or token_command, to what it offers",
    )


async def login(connection: Authenticating, credentials: Credentials, wanted: str = "auto") -> None:
    """Raises `UpstreamRefused` with the server's own reply, made temporary (the mail is not at fault), or `UpstreamError`."""
    mechanism = choose_mechanism(connection.auth_mechanisms(), wanted, token=bool(credentials.token))
    initial, answers = _exchange(mechanism, credentials)
    remaining = iter(answers)

    async def answer(_text: bytes, /) -> bytes | None:
        return next(remaining, None)

    reply = await connection.authenticate(mechanism, initial, answer)
    if reply.code != 235:
        # 535 would bounce every mail for a wrong setting of ours; 451 keeps it queued until that is mended.
        raise UpstreamRefused(Reply(451, "4.7.0", "The next mail server does not accept our login, nothing was sent"))


def _exchange(mechanism: str, credentials: Credentials) -> tuple[bytes | None, tuple[bytes, ...]]:
    """Initial response and the answers to the challenges after it."""
    user, secret = credentials.username.encode(), (credentials.token or credentials.password).encode()
    if b"\0" in user + secret or b"\x01" in user + secret or b"\n" in user + secret or b"\r" in user + secret:
        raise UpstreamError("the login for the next mail server holds a control character")
    match mechanism:
        case "PLAIN":
            return b"\0" + user + b"\0" + secret, ()
        case "LOGIN":
            return None, (user, secret)
        case "XOAUTH2":     # a failure is a challenge with JSON, to be answered with nothing
            return b"user=" + user + b"\x01auth=Bearer " + secret + b"\x01\x01", (b"",)
        case "OAUTHBEARER":     # RFC 7628 3.2.3: a failure is a challenge, to be answered with 0x01
            name = user.replace(b"=", b"=3D").replace(b",", b"=2C")
            return b"n,a=" + name + b",\x01auth=Bearer " + secret + b"\x01\x01", (b"\x01",)
    raise UpstreamError(f"login with {mechanism} is not supported")
