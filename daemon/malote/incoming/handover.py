"""Handing messages on to the next server of a gateway: one client transaction, and the upstream transactions that it becomes.

Each RCPT of the client is put to the next server when it arrives, and that server's reply is the client's. If the message then
goes to all of them as one, that transaction carries it; otherwise it is given back, and each body has one of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from malote.errors import Reply, UpstreamError
from malote.smtp.connection import IN_DOUBT
from malote.smtp.desk import Params
from malote.smtp.lanes import PooledLane
from malote.smtp.path import HOPS
from malote.smtp.relay import UpstreamConnection

# Of MAIL; SIZE and BODY are told anew. SMTPUTF8 is told if the client did, for its addresses, and never for what an opened header
# holds: a server that knows it would bounce the mail once it comes to one that does not, and all take such headers undeclared.
_PASSED_ON = ("SMTPUTF8", "RET", "ENVID", "REQUIRETLS")
_ERROR = UpstreamError().reply


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One recipient, as the next server is told."""

    path: str
    params: Params


@dataclass(frozen=True, slots=True)
class Result:
    """`certain`: if it is no acceptance, the next server has not got the message."""

    reply: Reply
    certain: bool = True

    @property
    def accepted(self) -> bool:
        return self.reply.code // 100 == 2


class Handover:
    """From MAIL of the client to the end of its transaction. `hops`: gateways that have the message in hand before us."""

    def __init__(self, lane: PooledLane, sender: str, params: Params, hops: int) -> None:
        self._lane = lane
        self._sender = sender
        self._params = params
        self._hops = hops
        self._lock = asyncio.Lock()
        self._connection: UpstreamConnection | None = None
        self._asked: list[tuple[Target, asyncio.Future[Reply]]] = []    # in the open transaction, in order
        self._open_params: Params = {}
        self._under_way = 0                     # RCPT that wait for their reply

    # while the client names its recipients

    async def rcpt(self, target: Target) -> Reply:
        """Raises `UpstreamError`."""
        self.hold()
        self._under_way += 1
        try:
            async with self._lock:
                future = await self._ask(target)
            return await future
        except BaseException:
            await self.end()
            raise
        finally:
            self._under_way -= 1
            if self._connection is not None and not self._under_way:
                self._lane.park(self._connection, self._give_up)

    async def _ask(self, target: Target) -> asyncio.Future[Reply]:
        connection = self._connection
        if connection is not None:
            future = connection.rcpt(target.path, target.params)
        else:
            params = self._mail_params(size=int(self._params.get("SIZE", 0)), eight_bit=True)
            self._connection, [future] = await self._begin(self._sender, params, [target])
            self._asked, self._open_params = [], params
        self._asked.append((target, future))
        return future

    @property
    def _open_for(self) -> list[Target]:
        """Whom the open transaction has, in order."""
        return [target for target, future in self._asked
                if future.done() and not future.cancelled() and not future.exception() and future.result().code // 100 == 2]

    def _give_up(self) -> None:
        """Others waited for the connection: who was accepted stays so, the message gets another transaction."""
        self._connection, self._asked = None, []

    def hold(self) -> None:
        """The client is not waited for: nobody may take the connection now."""
        if self._connection is not None:
            self._lane.unpark(self._connection)

    async def end(self) -> None:
        """Give the connection back; an open transaction is reset. May be called again."""
        self.hold()
        connection, self._connection, self._asked = self._connection, None, []
        if connection is not None:
            await self._lane.release(connection)

    # the message

    @property
    def eight_bit(self) -> bool:
        """Whether the next server takes text that is not ASCII."""
        return "8BITMIME" in self._lane.extensions

    async def deliver(self, targets: Sequence[Target], content: bytes, *, on_final_dot: Callable[[], object],
                      opened: bool = False, sender: str | None = None) -> list[Result]:
        """One body for these recipients; what became of each. `opened`: it came sealed. `sender`: in the place of the client's.
        Never raises but when cancelled."""
        sent = False

        def final_dot() -> None:
            nonlocal sent
            sent = True
            on_final_dot()

        connection: UpstreamConnection | None = None
        replies: list[Reply | None] = [None] * len(targets)
        try:
            params = self._mail_params(size=len(content), eight_bit=not content.isascii(), opened=opened)
            connection = self._take_open(targets, params) if sender is None else None
            if connection is None:
                await self.end()
                connection, asked = await self._begin(self._sender if sender is None else sender, params, targets)
                answered = [await future for future in asked]
                replies = [None if reply.code // 100 == 2 else reply for reply in answered]
            waiting = [number for number, reply in enumerate(replies) if reply is None]
            if connection is not None and waiting:
                answers = await connection.data(content, on_final_dot=final_dot)
                for number, answer in zip(waiting, answers, strict=True):
                    replies[number] = answer
            return [Result(reply or _ERROR, reply is not IN_DOUBT) for reply in replies]
        except UpstreamError as error:
            return [Result(error.reply, not sent) if reply is None else Result(reply) for reply in replies]
        finally:
            if connection is not None:
                await self._lane.release(connection)

    def _take_open(self, targets: Sequence[Target], params: Params) -> UpstreamConnection | None:
        """The transaction that is open, if it is for exactly these recipients and its MAIL said all that is to be said."""
        connection = self._connection
        if connection is None or not connection.usable or not connection.in_transaction or self._open_for != list(targets):
            return None
        if any(self._open_params.get(name) != value for name, value in params.items() if name != "SIZE"):
            return None
        self.hold()
        self._connection, self._asked = None, []
        return connection

    async def _begin(
        self, sender: str, params: Params, targets: Sequence[Target],
    ) -> tuple[UpstreamConnection | None, list[asyncio.Future[Reply]]]:
        """MAIL and RCPT, and the reply to each recipient. No connection: MAIL was refused, for all. Raises `UpstreamError`."""
        asked: dict[UpstreamConnection, asyncio.Future[Reply]] = {}     # a kept connection may be lost: then another is asked

        def first(connection: UpstreamConnection) -> asyncio.Future[Reply]:
            asked[connection] = connection.rcpt(targets[0].path, targets[0].params)
            return asked[connection]

        connection, reply = await self._lane.begin(sender, params, first)
        if reply.code // 100 != 2:
            await self._lane.release(connection)
            return None, [_answered(reply) for _ in targets]
        futures = [asked.get(connection) or connection.rcpt(targets[0].path, targets[0].params)]
        return connection, futures + [connection.rcpt(target.path, target.params) for target in targets[1:]]

    def _mail_params(self, *, size: int, eight_bit: bool, opened: bool = False) -> dict[str, str | bool]:
        extensions = self._lane.extensions
        params: dict[str, str | bool] = {name: self._params[name] for name in _PASSED_ON if name in self._params}
        if opened and "DSN" in extensions:      # a bounce goes back over the ways that the sealed form was made for
            params["RET"] = "HDRS"
        if size and "SIZE" in extensions:
            params["SIZE"] = str(size)
        if eight_bit and "8BITMIME" in extensions:
            params["BODY"] = "8BITMIME"
        if HOPS in extensions:
            params[HOPS] = str(self._hops + 1)
        return params


def _answered(reply: Reply) -> asyncio.Future[Reply]:
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    future.set_result(reply)
    return future
