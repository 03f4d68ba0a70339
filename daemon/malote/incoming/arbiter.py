"""Two watchers of one mailbox: whose opened copy stays.

The MOVE of the original decides (design, Incoming): whoever receives its COPYUID won and keeps its copy. Whoever
finds the original gone looks for it in the sealed folder. If it lies there and another watcher's copy of the same message is to
be seen, that watcher won and our copy goes. If the original is elsewhere, a person moved or deleted it, and our copy stays.

What that cannot decide at once is a *contest*: after a crash between MOVE and the note in the store; when a person takes the
original from under two watchers, or files the winner's copy while the loser looks for it; when a server lets two MOVEs of one
message at the same moment both succeed (Dovecot 2.3 with Maildir does: each then finds the other's original in the sealed
folder); when the winner found the copy of another device there too, which may be dead. It is settled later, when every loser
that knows it has gone: the device with the greatest name yields first. Any other waits for those with greater names while one of
them goes in each round, and yields when they stay, since then they know of no contest. A device may wake from
sleep in the middle of that, so time alone proves nothing: whoever yields marks its copy first and then looks whether the other's
is unmarked (`ImapDelivery.withdraw`). Of two that do so at once at least one sees the other, and stays.
Nobody relies on another device's copy instead of its own: that device may be about to take it back, for it may see a third one's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from malote.incoming.account import Mark
from malote.incoming.mailbox import Folder

# A loser takes its copy back within one round trip of its MOVE. If it does not come to it within half of this time, it no
# longer does so at once, and a contest decides.
CONTEST_MS = 30_000
MAX_CONTESTS = 10_000       # a hostile server can show as many marked copies as it likes


@dataclass(frozen=True, slots=True)
class Copy:
    """One opened copy in a folder."""

    mark: Mark
    folder: Folder
    uid: int
    discarded: bool = False     # marked as deleted, or in the trash: a person may empty that at any moment


class Settle(Enum):
    KEEP = "keep"
    YIELD = "yield"
    WAIT = "wait"       # for a device with a greater name to yield


def decide_after_lost_move(ours: Mark, copies: Collection[Copy], *, original_is_sealed: bool, late: bool) -> bool:
    """Whether our copy stays for now, after a MOVE that found the original gone; a contest follows then.

    `copies`: all marked copies of this message. `late`: it took long to come here since the MOVE.
    """
    return late or not (original_is_sealed and _others(ours, copies))


def decide_contest(ours: Mark, copies: Collection[Copy], *, waited_for: frozenset[str] = frozenset()) -> Settle:
    """What becomes of our copy. `waited_for`: the greater names that were there the last time (see `greater_names`).

    What a person has thrown away does not count: it is no place to leave the only copy.
    """
    others = _others(ours, [copy for copy in copies if not copy.discarded])
    if not others:
        return Settle.KEEP
    greater = greater_names(ours, copies)
    return Settle.YIELD if not greater or greater == waited_for else Settle.WAIT


def greater_names(ours: Mark, copies: Collection[Copy]) -> frozenset[str]:
    """The devices that yield before ours does."""
    return frozenset(device for device in _others(ours, [copy for copy in copies if not copy.discarded]) if device > ours.device)


def _others(ours: Mark, copies: Collection[Copy]) -> set[str]:
    return {copy.mark.device for copy in copies if copy.mark.device != ours.device}


@dataclass(frozen=True, slots=True)
class Contest:
    """A message of which two devices may have left a copy."""

    message: str                                # first half of the mark
    due_ms: int
    waited_for: frozenset[str] = frozenset()    # the greater names that were there the last time
    at_rest: bool = False                       # the last look found nothing to do


class Contests:
    """All that are open. One ends when our copy is taken back, or when two looks in a row find nothing to do: while a person
    moves a copy from one folder to another, a look at both may miss it."""

    def __init__(self) -> None:
        self._open: dict[str, Contest] = {}

    def open(self, message: str, now_ms: int) -> None:
        if message not in self._open and len(self._open) < MAX_CONTESTS:
            self._open[message] = Contest(message, now_ms + CONTEST_MS)

    def wait(self, message: str, now_ms: int, waiting_for: frozenset[str]) -> None:
        self._open[message] = Contest(message, now_ms + CONTEST_MS, waiting_for)

    def rest(self, message: str, now_ms: int) -> None:
        """A look has found nothing to do."""
        contest = self._open.get(message)
        if contest is not None and not contest.at_rest:
            self._open[message] = Contest(message, now_ms + CONTEST_MS, contest.waited_for, at_rest=True)
        else:
            self.close(message)

    def close(self, message: str) -> None:
        self._open.pop(message, None)

    def due(self, now_ms: int) -> list[Contest]:
        return [contest for contest in self._open.values() if contest.due_ms <= now_ms]

    def next_ms(self) -> int | None:
        """When the next one is due; None: there is none."""
        return min((contest.due_ms for contest in self._open.values()), default=None)
