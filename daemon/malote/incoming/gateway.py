"""The desk behind one opening listener: the envelope goes to the next server at once, the message to `Passage`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from malote.config import OpeningConfig
from malote.core.address import canonical_address
from malote.core.trace import received_line
from malote.errors import FormatError, Reply, UpstreamError
from malote.incoming.handover import Handover, Target
from malote.incoming.passage import Mail, Passage, Recipient
from malote.smtp.desk import AuthOutcome, ClientSession, Offer, Params
from malote.smtp.lanes import PooledLane
from malote.smtp.path import HOPS, LOOP, MAX_ASKING
from malote.smtp.relay import Upstream
from malote.smtp.sizes import announced_limit

ADDED_BYTES = 16 * 1024     # by which our headers may make a message larger
MAX_UNPROVED = 1000         # messages of one connection that wait for the proof that their replies were read

_MAIL_OK = Reply(250, "2.1.0", "Sender ok")
_NO_LOGIN = Reply(504, "5.5.4", "There is no login here")
_NO_TRANSACTION = Reply(503, "5.5.1", "Send MAIL first")
_NO_ANSWER = UpstreamError.default_reply
_CARRIED = frozenset({"8BITMIME", "SMTPUTF8", "DSN", "REQUIRETLS"})     # extensions that are offered if the next server has them


@dataclass(slots=True)
class Transaction:
    """What the client has said since MAIL. `asked` in the order of RCPT, each with its reply; None: there was none."""

    handover: Handover
    asked: list[tuple[Recipient, asyncio.Future[Reply | None]]] = field(default_factory=list)


@dataclass(slots=True)
class SessionState:
    tx: Transaction | None = None
    unproved: list[int] = field(default_factory=list)       # rows whose 250 the client has not proved to have read


class Gateway:
    """Implements `Desk`."""

    def __init__(self, config: OpeningConfig, *, upstream: Upstream, passage: Passage, host: str,
                 clock: Callable[[], int]) -> None:
        self._config = config
        self._lane = PooledLane(upstream, config.upstream.upstream_connections)
        self._passage = passage
        self._host = host
        self._clock = clock

    async def offer(self, session: ClientSession) -> Offer:
        """What the next server can carry. Raises `UpstreamError` when that cannot be found out."""
        session.state = session.state or SessionState()
        extensions = await self._lane.ask()
        limit = announced_limit(extensions)
        return Offer((_CARRIED & extensions.keys()) | {HOPS}, max(1, limit - ADDED_BYTES) if limit else 0)

    async def authenticate(self, session: ClientSession, mechanism: str, initial: bytes | None) -> AuthOutcome:
        return AuthOutcome(_NO_LOGIN)

    async def mail(self, session: ClientSession, address: str, params: Params) -> Reply:
        hops = int(params.get(HOPS, 0))
        if hops >= MAX_ASKING:
            return LOOP
        cast(SessionState, session.state).tx = Transaction(Handover(self._lane, address, params, hops))
        return _MAIL_OK

    async def rcpt(self, session: ClientSession, address: str, params: Params) -> Reply:
        tx = cast(SessionState, session.state).tx
        if tx is None:
            return _NO_TRANSACTION
        try:
            canonical = canonical_address(address)
        except FormatError:     # as "postmaster": whether there is such a mailbox the next server knows
            canonical = ""
        known = next((each for each in tx.asked if canonical and each[0].address == canonical), None)
        if known is not None:       # the same mailbox again: asked for once, and served once
            tx.asked.append(known)
            return await asyncio.shield(known[1]) or _NO_ANSWER
        recipient = Recipient(canonical, Target(address, params), self._passage.keys.of(canonical) if canonical else None)
        answered: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        tx.asked.append((recipient, answered))
        reply: Reply | None = None
        try:
            reply = await tx.handover.rcpt(recipient.target)
        finally:
            answered.set_result(reply)
        return reply

    async def data(self, session: ClientSession, content: bytearray) -> Reply:
        state = cast(SessionState, session.state)
        tx = state.tx
        if tx is None:
            return _NO_TRANSACTION
        tx.handover.hold()
        accepted = [recipient for recipient, answered in tx.asked
                    if answered.done() and (reply := answered.result()) is not None and reply.code // 100 == 2]
        ours = received_line(self._host, helo=session.helo, peer="" if session.peer == "unix" else session.peer,
                             protocol=self._protocol(session), now_ms=self._clock())
        mail = Mail(session.id, tx.handover, b"".join((ours, content)), len(ours), session.keep_going)
        content.clear()
        try:
            return await self._passage.deliver(mail, accepted)
        except BaseException:
            self._passage.not_told(mail.delivered)
            mail.delivered.clear()
            raise
        finally:
            state.unproved += mail.delivered
            del state.unproved[:-MAX_UNPROVED]
            state.tx = None
            await tx.handover.end()

    def _protocol(self, session: ClientSession) -> str:
        """The `with` of the Received line (RFC 3848)."""
        if self._config.protocol == "smtp":
            return session.protocol
        return f"{'UTF8' if session.smtputf8 else ''}LMTP{'S' if session.tls else ''}"

    async def reset(self, session: ClientSession) -> None:
        state = cast(SessionState | None, session.state)
        if state is not None and state.tx is not None:
            tx, state.tx = state.tx, None
            await tx.handover.end()

    async def close(self, session: ClientSession) -> None:
        await self.reset(session)
        state = cast(SessionState | None, session.state)
        session.state = None
        if state is not None:
            self._passage.not_told(state.unproved)

    def reply_read(self, session: ClientSession) -> None:
        state = cast(SessionState | None, session.state)
        if state is not None:
            state.unproved.clear()
