"""What the SMTP server needs from whoever answers it: the `Desk`, and the session it is told about.

The server owns the protocol (syntax, order of commands, limits, timers); the desk decides what is answered. The order of
calls for one connection is `offer` (each EHLO), `authenticate`, then per transaction `mail`, `rcpt`..., `data`; at the very
end `close`, always, once. `rcpt` runs concurrently with other `rcpt` of the same transaction where the client pipelines:
calls *begin* in the client's order, replies are sent in the client's order. Everything else is one at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from malote.errors import Reply

Params = Mapping[str, "str | bool"]     # ESMTP parameters, keyword in capitals; True where it has no value


@dataclass(frozen=True, slots=True)
class Offer:
    """What EHLO may promise: only what the upstream server can carry.

    `size` in bytes, 0: no limit of the upstream's (the server then offers its own). `auth`: SASL mechanisms in capitals.
    PIPELINING, ENHANCEDSTATUSCODES and CHUNKING are the server's own and not listed here. BINARYMIME is never offered: the
    upstream connection uses DATA, which cannot carry it (RFC 3030 section 3).
    """

    extensions: frozenset[str] = frozenset()    # of 8BITMIME, SMTPUTF8, DSN, REQUIRETLS
    size: int = 0
    auth: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthOutcome:
    """`login` is the authenticated name, "" if refused. With pass-through `reply` is the upstream server's own."""

    reply: Reply
    login: str = ""

    def __post_init__(self) -> None:
        if (self.reply.code == 235) != bool(self.login):
            raise ValueError("235 needs a login, and only 235 has one")


@dataclass(slots=True, eq=False)
class ClientSession:
    """One connected client, as the desk sees it."""

    id: str                         # for the log: unique in this process
    peer: str                       # IP address of the client, through proxies that are trusted; "unix", or "unknown"
    peer_uid: int | None = None     # of the process at the other end of a UNIX socket (SO_PEERCRED)
    loopback: bool = False          # the peer is this machine: 127.0.0.0/8, ::1 or a UNIX socket
    tls: bool = False
    tls_version: str = ""
    helo: str = ""
    esmtp: bool = False
    login: str = ""                 # set by the server from AuthOutcome
    vouched: str = ""               # the login that a trusted peer has let in (XCLIENT)
    certificate: tuple[str, ...] = ()   # the names in the client's certificate, which a `client_ca` of ours has signed
    known: str = ""                 # set by the desk: who it is without AUTH, by one of these or by its uid
    forwarded: str = ""             # the client of the next transaction, as a trusted peer says (XFORWARD); for counting only
    smtputf8: bool = False          # of the current transaction
    state: Any = None               # the desk's own
    _challenge: Callable[[bytes], Awaitable[bytes | None]] | None = field(default=None, repr=False)
    _kept: bool = field(default=False, repr=False)

    async def challenge(self, text: bytes) -> bytes | None:
        """During `authenticate`: send 334 with `text` (not yet base64), return the decoded answer; None: the client gave up.

        After None the desk returns any refusing AuthOutcome; the server says its own 501 instead of that reply.
        """
        if self._challenge is None:
            raise RuntimeError("challenge() outside of authenticate()")
        return await self._challenge(text)

    def keep_going(self) -> None:
        """Called by the desk in `data`, right before the first final dot goes out: from here the work is finished even if the
        client vanishes. Before it, a vanished client cancels `data` (the client will try again; nothing was sent)."""
        self._kept = True

    @property
    def user(self) -> str:
        """Whose login it is, however it is known; "" for nobody."""
        return self.login or self.known

    @property
    def protocol(self) -> str:
        """The `with` of a Received line (RFC 3848, RFC 6531 section 4.3)."""
        if not self.esmtp:
            return "SMTP"
        return f"{'UTF8' if self.smtputf8 else 'E'}SMTP{'S' if self.tls else ''}{'A' if self.login else ''}"


class Desk(Protocol):
    """A MaloteError raised from any method is answered with its reply; any other exception with 451 and no detail.

    After either, and after a reply that is not 2xx to `mail`, the transaction is over and `reset` is called.
    """

    async def offer(self, session: ClientSession) -> Offer: ...

    async def authenticate(self, session: ClientSession, mechanism: str, initial: bytes | None) -> AuthOutcome:
        """`mechanism` in capitals and in the offer; `initial` decoded, None when the client sent none."""
        ...

    async def mail(self, session: ClientSession, address: str, params: Params) -> Reply:
        """`address` as sent, "" for the null sender. Params checked for syntax: SIZE, BODY, SMTPUTF8, RET, ENVID, AUTH,
        REQUIRETLS; values verbatim."""
        ...

    async def rcpt(self, session: ClientSession, address: str, params: Params) -> Reply:
        """Params: NOTIFY, ORCPT, verbatim. A 2xx reply means that the recipient is part of the transaction."""
        ...

    async def data(self, session: ClientSession, content: bytearray) -> Reply:
        """`content`: the message without dot-stuffing, in CRLF lines, no bare CR or LF, no NUL; from BDAT the last line may
        lack its CRLF. The desk may keep or change it. Cancelled if the client vanishes before `session.keep_going()`."""
        ...

    async def reset(self, session: ClientSession) -> None:
        """A transaction ended without `data` having returned: RSET, EHLO, an error."""
        ...

    async def close(self, session: ClientSession) -> None:
        """The connection is gone; nothing more will be called."""
        ...

    def reply_read(self, session: ClientSession) -> None:
        """The client has read every `data` reply of this session up to now: it sent a command whose first byte arrived after
        the last of them had been written."""
        ...
