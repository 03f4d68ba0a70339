"""Acts on what `arbiter` decides: takes our own copy back where another device's stays, at once or when a contest is settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from malote.incoming.account import Mark
from malote.incoming.arbiter import CONTEST_MS, Contests, Copy, Settle, decide_after_lost_move, decide_contest, greater_names
from malote.incoming.delivery import Delivery
from malote.incoming.foreign import ForeignFolders
from malote.incoming.mailbox import Folder
from malote.incoming.session import Session

SETTLED_AT_ONCE = 100       # contests: what was seen of the copies must not be old when one is taken back


class Settler:
    """Of one account over one session."""

    def __init__(self, *, delivery: Delivery, foreign: ForeignFolders, sealed: Folder, contests: Contests, device: str,
                 clock: Callable[[], int]) -> None:
        self._delivery = delivery
        self._foreign = foreign
        self._sealed = sealed
        self._contests = contests
        self._device = device
        self._clock = clock

    async def after_lost_moves(self, session: Session, source: Folder, lost: Sequence[tuple[Mark, bytes]]) -> None:
        """The originals, by our mark and payload digest, are gone from `source`: another watcher or a person has moved them."""
        if not self._delivery.shared:
            return
        asked_ms = self._clock()
        sealed = await self._foreign.look(session, self._sealed)
        known = await self._copies_of(session, source, {mark.message: digest in sealed for mark, digest in lost})
        for mark, digest in lost:
            copies = known.get(mark.message, [])
            late = self._clock() - asked_ms > CONTEST_MS // 2
            found = any(copy.mark.device == self._device for copy in copies)    # else somebody is just moving it
            if not found or decide_after_lost_move(mark, copies, original_is_sealed=digest in sealed, late=late):
                self._contests.open(mark.message, self._clock())
            elif await self._withdraw(session, copies, self._anothers(copies)):
                self._foreign.note_settled(digest)
            else:
                self._contests.open(mark.message, self._clock())

    async def settle(self, session: Session) -> None:
        """Where two devices may each have left a copy and nobody knows who won, one of them takes its own back."""
        due = self._contests.due(self._clock())[:SETTLED_AT_ONCE]
        known = _by_message(await self._delivery.copies_anywhere(session, [contest.message for contest in due]))
        for contest in due:
            message = contest.message
            ours, copies = Mark(message, self._device), known.get(message, [])
            decision = decide_contest(ours, copies, waited_for=contest.waited_for)
            if decision is Settle.WAIT:
                self._contests.wait(message, self._clock(), greater_names(ours, copies))
            elif (other := await self._stays(session, copies) if decision is Settle.YIELD else None) is None:
                self._contests.rest(message, self._clock())
            elif await self._withdraw(session, copies, other):
                self._contests.close(message)
            else:       # somebody is just moving one of them, or the other device is about to go too: from the beginning
                self._contests.wait(message, self._clock(), frozenset())

    async def _stays(self, session: Session, copies: Sequence[Copy]) -> Copy | None:
        """Another device's copy that may stay in the place of ours, as it says the same: its device may have died before it could
        verify it. None also where ours is not to be found."""
        ours = [copy for copy in copies if copy.mark.device == self._device]
        for other in copies:
            stays = other.mark.device != self._device and not other.discarded
            if ours and stays and await self._delivery.is_same(session, ours[0], other):
                return other
        return None

    async def _copies_of(self, session: Session, source: Folder, messages: Mapping[str, bool]) -> dict[str, list[Copy]]:
        """The copies of each; those of which fewer than two are found though the original is sealed (True) also in all other
        folders: a person may have filed one."""
        found = _by_message(await self._delivery.copies(session, source, messages))
        filed = [message for message, is_sealed in messages.items()
                 if is_sealed and len({copy.mark.device for copy in found.get(message, [])}) < 2]
        return found | _by_message(await self._delivery.copies_anywhere(session, filed))

    def _anothers(self, copies: Iterable[Copy]) -> Copy | None:
        """One that is there for a person to read, else one that a person has thrown away."""
        others = [copy for copy in copies if copy.mark.device != self._device]
        return min(others, key=lambda copy: copy.discarded, default=None)

    async def _withdraw(self, session: Session, copies: Iterable[Copy], other: Copy | None) -> bool:
        """Whether all of ours were still where they had been seen, and `other` still stays."""
        ours = [copy for copy in copies if copy.mark.device == self._device]
        return all([await self._delivery.withdraw(session, copy, other) for copy in ours])


def _by_message(copies: Iterable[Copy]) -> dict[str, list[Copy]]:
    found: dict[str, list[Copy]] = {}
    for copy in copies:
        found.setdefault(copy.mark.message, []).append(copy)
    return found
