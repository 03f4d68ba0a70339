"""XCLIENT and XFORWARD: a peer that is trusted says for whom it speaks.

XCLIENT replaces the client: what it may do is decided by the address and the login that the peer gives. XFORWARD changes nothing
but whom a message is counted for. Both are commands only for peers that the listener names; for others there are none.
"""

from __future__ import annotations

from aiosmtpd.smtp import syntax

from malote.errors import Reply
from malote.smtp.conversation import Conversation
from malote.smtp.desk import ClientSession, Offer
from malote.smtp.forwarded import XCLIENT, XFORWARD, parse_attributes
from malote.smtp.networks import UNKNOWN, is_loopback
from malote.smtp.wire import ClientGone

UNKNOWN_COMMAND = Reply(500, "5.5.2", "Command not recognised")
NOT_NOW = Reply(503, "5.5.1", "Not inside a transaction")


class PeerCommands(Conversation):
    """Methods named as aiosmtpd names them: `smtp_` and the verb."""

    @syntax("XCLIENT attribute=value ...")
    async def smtp_XCLIENT(self, argument: str) -> None:  # noqa: N802
        if not self._may_speak_for_others:
            return self._fault(UNKNOWN_COMMAND)
        if self._open:
            return self._fault(NOT_NOW)
        values = parse_attributes(argument, XCLIENT)
        old = self.client
        address = values.get("ADDR", old.peer) or UNKNOWN
        new = ClientSession(old.id, address, tls=old.tls, tls_version=old.tls_version, vouched=values.get("LOGIN", old.vouched))
        # an address of the peer's machine is one of this machine only if the peer is here
        new.loopback = self._peer_is_here and is_loopback(address)
        await self._ask(self._desk.close(old))
        self.client, self._offer, self._named = new, Offer(), True
        self._connections.discard(self)
        refusal = self._admit()
        if refusal is not None:
            self.hang_up(refusal)
            raise ClientGone
        self.say(self._greeting)
        return None

    @syntax("XFORWARD attribute=value ...")
    async def smtp_XFORWARD(self, argument: str) -> None:  # noqa: N802
        if not self._may_speak_for_others:
            return self._fault(UNKNOWN_COMMAND)
        if self._open:
            return self._fault(NOT_NOW)
        values = parse_attributes(argument, XFORWARD)
        self.client.forwarded = values.get("ADDR", self.client.forwarded)
        self.say(Reply(250, "2.0.0", "Ok"))
        return None
