"""This process as one of several that share a store: what it has to itself, and when it has to let go of it.

Whoever cannot reach the store loses its membership by the database's clock; others then take over its mailboxes. It must have
stopped by then, so it goes by its own clock from before it last asked, and stops while there is time left.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress

import structlog

from malote.errors import MaloteError
from malote.store import Store
from malote.store.members import Tenure

RENEW_SECONDS = 5.0
FIRST_LOOK_SECONDS = 1.0        # so that those who start together share from the beginning
STOP_BEFORE_SECONDS = 12.0      # the end of the membership: watchers are told to finish the batch in hand
CUT_BEFORE_SECONDS = 4.0        # the same: those that have not are broken off
LAST_SECONDS = 2.0              # the same: not one command more is sent
LOOK_SECONDS = 1.0              # how often the clock is looked at: that of `sleep` stands still while the machine is suspended

log = structlog.get_logger("malote.service")


class Membership:
    """`owner` names this process; `before` is one known to be dead, in whose place it was started."""

    def __init__(self, store: Store, owner: bytes, *, before: bytes = b"") -> None:
        self.owner = owner
        self.accounts = 0           # how many mailboxes this process could watch
        self._store = store
        self._before = before
        self._renewed = asyncio.Event()
        self._lapsed = asyncio.Event()

    @property
    def tenure(self) -> Tenure:
        """What begins now may go on for as long as this one lasts."""
        return self._store.tenure

    @property
    def seconds_left(self) -> float:
        return self._store.tenure.seconds_left

    async def join(self) -> None:
        """Raises `StoreUnavailable`."""
        await self._store.join(self.owner, before=self._before, accounts=self.accounts)

    async def keep(self) -> None:
        """Renew it for ever."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                if not await self._store.renew_membership(self.accounts):
                    self._lapsed.set()
                self._renewed.set()
            except MaloteError as error:
                log.warning("store not available", fault=str(error))
            except Exception:       # as above: what counts is that it was not renewed
                log.exception("membership not renewed")

    async def guard(self, let_go: Callable[[float], Awaitable[None]]) -> None:
        """Call `let_go` with the seconds that it may take whenever the membership is about to end, or has ended unnoticed."""
        while True:
            if self._lapsed.is_set():
                self._lapsed.clear()
                log.error("this process was away for so long that others may have taken over what it watches")
                await let_go(0.0)
            left = self.seconds_left - STOP_BEFORE_SECONDS
            if left > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await self._lapsed.wait()
                continue
            log.error("the store cannot be reached: other processes may take over what this one watches")
            await let_go(max(0.0, self.seconds_left - CUT_BEFORE_SECONDS))
            while self.seconds_left < STOP_BEFORE_SECONDS:
                self._renewed.clear()
                await self._renewed.wait()

    async def leave(self) -> None:
        """What is still held is free at once; where that cannot be written, after MEMBER_MS."""
        try:
            await self._store.leave()
        except MaloteError as error:
            log.warning("store not available", fault=str(error))

    # --- shares ---

    async def lost(self, held: Collection[str]) -> list[str]:
        """What is held no more: another has it, or, after a failover, the database does not know. Raises `StoreUnavailable`."""
        if not held:
            return []
        leases = await self._store.leases()
        return [name for name in held if leases.get(name) != self.owner]

    async def look(self, wanted: Collection[str], held: Collection[str], overdue: set[str],
                   kept: Collection[str]) -> tuple[list[str], list[str]]:
        """What to take and what to give back now; see `decide_shares`. Raises `StoreUnavailable`."""
        leases = await self._store.leases()
        return decide_shares(wanted, leases, await self._store.members(), self.owner, held, overdue, kept)

    async def take(self, name: str) -> bool:
        """False: another was quicker, or there is too little time left."""
        return self.seconds_left > STOP_BEFORE_SECONDS and await self._store.take_lease(name)

    async def give_back(self, name: str) -> None:
        await self._store.give_lease_back(name)


def decide_shares(wanted: Collection[str], leases: Mapping[str, bytes], members: Mapping[bytes, int], own: bytes,
                  held: Collection[str], overdue: set[str], kept: Collection[str]) -> tuple[list[str], list[str]]:
    """Names to take and names to give back, so that all members that could watch have about as many.

    `overdue`: what nobody took since the last look is taken whatever the share is, since others may not have that account at all;
    it is replaced by what is free now. `kept`: what was taken that way is not given back.
    """
    free = [name for name in wanted if name not in held and leases.get(name, own) == own]
    random.shuffle(free)        # or all would try the same first
    share = math.ceil(len(wanted) / max(1, sum(1 for accounts in members.values() if accounts)))
    room = max(0, share - len(held))
    late = [name for name in free if name in overdue]
    others = [name for name in free if name not in overdue]
    overdue.clear()
    overdue.update(free)
    spare = [name for name in held if name not in kept]
    random.shuffle(spare)
    return late + others[:max(0, room - len(late))], spare[:max(0, len(held) - share)]
