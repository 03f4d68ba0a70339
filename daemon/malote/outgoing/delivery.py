"""Bringing the copies of one message to the upstream server, each in its own transaction, and what became of each recipient."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import structlog

from malote.core.keys import SignatureAlgorithm
from malote.errors import LeaseLost, MaloteError, NotProven, Reply, UpstreamError
from malote.outgoing.answers import Outcome, State, outcome_of
from malote.outgoing.clearance import Clearance, clear
from malote.outgoing.copies import Letter, make_copy
from malote.outgoing.envelope import mail_params, same_transaction
from malote.outgoing.groups import Group
from malote.outgoing.transaction import Recipient, Transaction
from malote.smtp.desk import Params
from malote.smtp.lanes import Lane
from malote.smtp.relay import UpstreamConnection
from malote.store import Tenure

log = structlog.get_logger("malote.outgoing")

# Above this, sealing leaves the event loop for a thread. Measured: 64 KB take 0.4 ms more than an empty message, a thread 0.1 ms.
# An ML-DSA signature takes 1 ms, in which other threads run: a thread at any size.
INLINE_BYTES = 64 * 1024

NOT_CONFIRMED = Reply(451, "4.4.2", "The next mail server did not confirm the message, try again later; nobody gets it twice")
# said of what leaves unsealed: a second copy of it nobody can tell from the first (RFC 1047)
NOT_CONFIRMED_PLAIN = Reply(451, "4.4.2", "The next mail server did not confirm the message, try again later")
TOO_LATE = Reply(451, "4.4.7", "Not sent in time, try again later")
LOCAL = MaloteError.default_reply


@dataclass(slots=True)
class Delivery:
    """The copies of one letter on their way. `deadline` is loop time; `on_final_dot` is called before each final dot."""

    letter: Letter
    lane: Lane
    sender: str                 # of the envelope, as the client wrote it
    client_params: Params
    deadline: float
    on_final_dot: Callable[[], object]
    executor: Executor
    tenure: Tenure | None = None    # while it lasts, nobody else who shares the store sends the same; None: nobody shares it
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    outer_ids: list[str] = field(default_factory=list)      # of the sealed copies that were accepted, in order
    copies: int = 0
    alarm: str = ""             # what the last check found wrong with a copy, which then did not leave
    _stopped: Outcome | None = None     # the server cannot be reached: no use trying the rest
    _ready: Clearance | None = None          # made for the open transaction, which then did not fit

    async def run(self, groups: Sequence[Group], opened: Transaction | None) -> None:
        """Never raises but on cancellation: every failure is an outcome. `opened`: the client's transaction, whose upstream
        transaction carries the message if all its recipients share one body."""
        try:
            if opened is not None and len(groups) == 1 and await self._send_opened(groups[0], opened):
                return
            if opened is not None:
                await opened.end()
            queue = deque(groups)
            workers = [self._work(queue) for _ in range(min(self.lane.width, len(queue)))]
            await (workers[0] if len(workers) == 1 else asyncio.gather(*workers))
        finally:
            for group in groups:
                for address in group.addresses:
                    self.outcomes.setdefault(address, self._stopped or Outcome(State.DEFERRED, TOO_LATE))

    async def _send_opened(self, group: Group, opened: Transaction) -> bool:
        """False: the open transaction does not fit, nothing was sent."""
        connection = opened.connection
        if connection is None or {recipient.address for recipient in opened.recipients} != set(group.addresses):
            return False
        copy = await self._make(group)
        if copy is None:
            return True
        if not same_transaction(opened.opened_params, self._params(copy, group, connection.extensions)):
            self._ready = copy
            return False
        await self._data(copy, opened.recipients, connection)
        return True

    async def _work(self, queue: deque[Group]) -> None:
        loop = asyncio.get_running_loop()
        while queue and self._stopped is None and loop.time() < self.deadline:
            group = queue.popleft()
            copy = await self._make(group)
            if copy is not None:
                await self._send(copy, group)

    async def _make(self, group: Group) -> Clearance | None:
        """One copy that may leave; None when it could not be made or may not, which is then the outcome."""
        if self._ready is not None:     # there is only one group then
            copy, self._ready = self._ready, None
            return copy
        self.copies += 1
        try:
            if len(self.letter.original) <= INLINE_BYTES and not (group.sealed and self._signs_slowly):
                return _make_cleared(self.letter, group)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.executor, _make_cleared, self.letter, group)
        except MaloteError as error:
            self._fail(error, group.addresses)
        except Exception as error:  # noqa: BLE001 - a border: other copies may be accepted already, and that must be recorded
            _log_fault(error)
            self._settle(group.addresses, Outcome(State.DEFERRED, LOCAL))
        return None

    @property
    def _signs_slowly(self) -> bool:
        identity = self.letter.identity
        return identity is not None and identity.signing.algorithm is SignatureAlgorithm.HYBRID

    def _fail(self, error: MaloteError, addresses: Sequence[str]) -> None:
        if isinstance(error, NotProven):    # a fault of ours was about to send what was not decided; no word of it in the log
            self.alarm = str(error)
            log.error("stopped by the last check", id=self.letter.submission_id.hex(), found=self.alarm,
                      recipients=len(addresses))
        self._settle(addresses, outcome_of(error.reply))

    async def _send(self, copy: Clearance, group: Group) -> None:
        """One transaction from MAIL on."""
        recipients = [self.letter.recipients[address] for address in group.addresses]
        connection: UpstreamConnection | None = None
        try:
            async with asyncio.timeout_at(self.deadline):
                params = self._params(copy, group, self.lane.extensions)
                connection, reply = await self.lane.begin(self.sender, params)
                if reply.code // 100 != 2:
                    self._settle(group.addresses, outcome_of(reply))
                    return
                replies = await asyncio.gather(*(connection.rcpt(each.path, each.params) for each in recipients))
            accepted = []
            for recipient, reply in zip(recipients, replies, strict=True):
                if reply.code // 100 == 2:
                    accepted.append(recipient)
                else:
                    self._settle((recipient.address,), outcome_of(reply))
            if accepted:
                await self._data(copy, accepted, connection)
        except TimeoutError:
            self._settle(group.addresses, Outcome(State.DEFERRED, TOO_LATE))
        except UpstreamError as error:
            outcome = outcome_of(error.reply)
            if connection is None:
                self._stopped = outcome
            self._settle(group.addresses, outcome)
        except Exception as error:  # noqa: BLE001 - a border, as above
            _log_fault(error)
            self._settle(group.addresses, Outcome(State.DEFERRED, LOCAL))
        finally:
            if connection is not None:
                await self.lane.release(connection)

    def _params(self, copy: Clearance, group: Group, extensions: Mapping[str, str]) -> dict[str, str | bool]:
        paths = [self.sender, *(self.letter.recipients[address].path for address in group.addresses)]
        return mail_params(self.client_params, sealed=copy.sealed, size=len(copy.raw), addresses=paths,
                           utf8_header=copy.utf8_header, extensions=extensions)

    async def _data(self, copy: Clearance, recipients: Sequence[Recipient], connection: UpstreamConnection) -> None:
        """DATA with the recipients already accepted. From the final dot on, what goes wrong leaves them in doubt."""
        dotted = False

        def final_dot() -> None:
            nonlocal dotted
            self._check_ours()
            dotted = True
            self.on_final_dot()

        addresses = [recipient.address for recipient in recipients]
        try:
            async with asyncio.timeout_at(self.deadline):
                replies = await connection.data(copy.raw, on_final_dot=final_dot, gate=copy.check)
            for address, reply in zip(addresses, replies, strict=True):
                outcome = outcome_of(reply)
                if dotted and outcome.state is State.DEFERRED:
                    # filters that time out say 4xx for what they have passed on (RFC 1047): kept under the same number
                    outcome = Outcome(State.IN_DOUBT, reply)
                self.outcomes[address] = outcome
        except TimeoutError:
            if not dotted:
                self._settle(addresses, Outcome(State.DEFERRED, TOO_LATE))
        except MaloteError as error:
            if not dotted:
                self._fail(error, addresses)
        except Exception as error:  # noqa: BLE001 - a border, as above
            _log_fault(error)
            connection.abort()
            if not dotted:
                self._settle(addresses, Outcome(State.DEFERRED, LOCAL))
        finally:    # also on cancellation
            if dotted:
                self._settle(addresses, Outcome(State.IN_DOUBT, NOT_CONFIRMED if copy.sealed else NOT_CONFIRMED_PLAIN))
        if copy.outer_id and any(self.outcomes[address].state is State.ACCEPTED for address in addresses):
            self.outer_ids.append(copy.outer_id)

    def _check_ours(self) -> None:
        """At the last moment: a process that was stopped for long must not send what another has sent meanwhile."""
        if self.tenure is not None and self.tenure.seconds_left <= 0:
            raise LeaseLost("another process may be sending this message now")

    def _settle(self, addresses: Iterable[str], outcome: Outcome) -> None:
        for address in addresses:
            self.outcomes.setdefault(address, outcome)


def _make_cleared(letter: Letter, group: Group) -> Clearance:
    """Both in one thread: a large message takes its time twice."""
    cleared = clear(letter, group, make_copy(letter, group))
    if type(cleared) is not Clearance:      # whatever else a broken check may give
        raise NotProven("no clearance")
    return cleared


def _log_fault(error: Exception) -> None:
    log.error("fault", error=type(error).__name__, exc_info=error)


