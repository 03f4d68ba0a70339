"""The state of one client transaction: its envelope, and the upstream transaction that was opened for it.

Each RCPT of the client goes to the upstream server when it arrives, and the upstream's reply is the client's. MAIL goes
together with the first RCPT: by then it is known whether the message will most likely be sealed, which its parameters depend on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from malote.core.card import Card
from malote.core.policy import Action, Decision, Policy, RecipientFacts
from malote.errors import Reply, UpstreamError
from malote.outgoing.envelope import estimated_size, mail_params
from malote.smtp.desk import Params
from malote.smtp.lanes import Lane
from malote.smtp.relay import UpstreamConnection
from malote.smtp.sizes import announced_limit


@dataclass(slots=True, eq=False)
class Recipient:
    """One recipient of the client's envelope. The card found at RCPT stays: DATA does no second look-up."""

    address: str                # canonical
    path: str                   # as the client wrote it
    params: Params              # NOTIFY, ORCPT, verbatim
    card: Card | None
    had_card: bool
    decision: Decision          # from the envelope alone, then from the content too
    policy: Policy | None = None    # that was in force then
    routes: tuple[RecipientFacts, ...] = ()     # where a server may send it on to, by its local part
    outsider: bool = False      # had no part in the opened message that this one answers
    trial: tuple[Action, Decision] | None = None    # what would become of him if the rules on trial counted
    refused: Reply | None = None    # by the server now, though it took a message for him before: DATA tells whether it is this
    action: Action | None = None    # final; None: not decided, and nothing may be sent
    reply: asyncio.Future[Reply] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def facts(self) -> RecipientFacts:
        return RecipientFacts(self.address, self.card is not None, self.had_card, self.outsider)

    @property
    def accepted(self) -> bool:
        reply = self.reply
        return reply.done() and not reply.cancelled() and reply.exception() is None and reply.result().code // 100 == 2


class Transaction:
    """From MAIL to the reply to DATA, RSET or the end of the connection."""

    def __init__(self, sender: str, params: Params, lane: Lane, *, fold: bool) -> None:
        self.sender = sender                            # as the client wrote it, "" is the null sender
        self.params = params
        self.lane = lane
        self.opened_params: dict[str, str | bool] = {}
        self.started = asyncio.get_running_loop().time()
        self._fold = fold
        self._recipients: dict[str, Recipient] = {}
        self._asked: list[Recipient] = []               # in the order of their RCPT at the upstream server
        self._kept: dict[str, Recipient] = {}           # refused by it, and kept all the same
        self._opening: asyncio.Future[UpstreamConnection | Reply] | None = None
        self._connection: UpstreamConnection | None = None
        self._together: asyncio.Future[Reply] | None = None     # RCPT of the first recipient, sent with MAIL
        self._under_way = 0                             # RCPT that wait for their reply
        self._taken = False                             # the upstream transaction was given up for others that waited
        self._ended = False

    @property
    def recipients(self) -> list[Recipient]:
        """Those that the upstream server accepted, in the order in which it did; and those kept though it did not."""
        accepted = [recipient for recipient in self._asked if recipient.accepted]
        return [*self._kept.values(), *accepted] if self._kept else accepted

    def keep(self, recipient: Recipient, refused: Reply) -> None:
        """The client is told that the recipient is fine, and at DATA what became of him."""
        recipient.refused = refused
        self._kept[recipient.address] = recipient

    @property
    def connection(self) -> UpstreamConnection | None:
        """With the upstream transaction open, ready for DATA; None if it has to be begun again."""
        connection = self._connection
        if connection is None or self._taken or not connection.usable or not connection.in_transaction:
            return None
        return connection

    def hold(self) -> None:
        """The client is not waited for any more: nobody may take the connection now."""
        if self._connection is not None:
            self.lane.unpark(self._connection)

    def _wait_for_client(self) -> None:
        if self._connection is not None and not self._under_way and not self._ended:
            self.lane.park(self._connection, self._give_up)

    def _give_up(self) -> None:
        """The recipients stay accepted; a further one is asked for in a new transaction, and none of them carries the message."""
        self._taken = True
        self._connection = None
        self._opening = None

    async def rcpt(self, recipient: Recipient) -> Reply:
        """Put one recipient to the upstream server; its reply. Raises `UpstreamError`. The same mailbox twice is asked once."""
        known = self._recipients.get(recipient.address)
        if known is not None:
            return await asyncio.shield(known.reply)
        self._recipients[recipient.address] = recipient
        self.hold()
        self._under_way += 1
        try:
            return await self._ask(recipient)
        finally:
            self._under_way -= 1
            self._wait_for_client()

    async def _ask(self, recipient: Recipient) -> Reply:
        try:
            opened = await self._open(recipient)
            if isinstance(opened, Reply):
                reply = opened
            else:
                self._asked.append(recipient)
                together, self._together = self._together, None
                reply = await (together or opened.rcpt(recipient.path, recipient.params))
        except BaseException as error:
            del self._recipients[recipient.address]
            if isinstance(error, UpstreamError):
                recipient.reply.set_exception(error)
                recipient.reply.exception()     # read: nobody else may be waiting for it
            else:
                recipient.reply.cancel()
            raise
        recipient.reply.set_result(reply)
        if not recipient.accepted:
            del self._recipients[recipient.address]
        return reply

    async def _open(self, first: Recipient) -> UpstreamConnection | Reply:
        """The connection with MAIL accepted, or the reply that refused MAIL. One attempt for all recipients."""
        if self._opening is not None:
            opened = await asyncio.shield(self._opening)
            if self._ended:     # the connection may carry the message of somebody else by now
                raise UpstreamError("the transaction was given up")
            return opened
        self._opening = asyncio.get_running_loop().create_future()
        try:
            opened = await self._begin(first)
        except BaseException as error:
            self._opening.set_exception(error if isinstance(error, UpstreamError) else UpstreamError("opening was given up"))
            self._opening.exception()
            raise
        self._opening.set_result(opened)
        return opened

    async def _begin(self, first: Recipient) -> UpstreamConnection | Reply:
        sealed = first.decision.action is Action.SEAL
        extensions = self.lane.extensions
        size = estimated_size(self.params, sealed=sealed, fold=self._fold, limit=announced_limit(extensions))
        self.opened_params = mail_params(self.params, sealed=sealed, size=size, addresses=(self.sender, first.path),
                                         utf8_header=False, extensions=extensions)

        sent: dict[UpstreamConnection, asyncio.Future[Reply]] = {}      # a kept connection may be lost, then MAIL goes to another

        def rcpt(connection: UpstreamConnection) -> asyncio.Future[Reply]:
            sent[connection] = connection.rcpt(first.path, first.params)
            return sent[connection]

        connection, reply = await self.lane.begin(self.sender, self.opened_params, rcpt)
        if self._ended or reply.code // 100 != 2:
            await self.lane.release(connection)
            if self._ended:
                raise UpstreamError("the transaction was given up while it was being opened")
            return reply
        self._connection = connection
        self._together = sent.get(connection)
        return connection

    async def end(self) -> None:
        """Give the upstream connection back; an open transaction is reset. May be called again."""
        self.hold()
        self._ended = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await self.lane.release(connection)
