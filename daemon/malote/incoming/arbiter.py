"""Two watchers of one mailbox: whose opened copy stays.

The MOVE of the original decides (design, Incoming): whoever receives its COPYUID won and keeps its copy. Whoever
finds the original gone looks for it in the sealed folder. If it lies there and another watcher's copy of the same message is to
be seen, that watcher won and our copy goes. If the original is elsewhere, a person moved or deleted it, and our copy stays.

What that cannot decide at once is a *contest*: after a crash between MOVE and the note in the store; when a person takes the
original from under two watchers, or files the winner's copy while the loser looks for it; when a server lets two MOVEs of one
message at the same moment both succeed (Dovecot 2.3 with Maildir does: each then finds the other's original in the sealed
folder); when the winner found the copy of another device there too, which may be dead. It is settled later, when every loser
that knows it has gone: the device with the greatest name yields first. Any other waits for those with greater names while one of
them goes in each round, and yields when they stay, since then they know of no contest. So devices never yield to each other.
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


class Contests:
    """Messages of which two devices may have left a copy, each with the time at which it is settled."""

    def __init__(self) -> None:
        self._due: dict[str, tuple[int, frozenset[str]]] = {}   # first half of the mark -> (ms, for whom we have waited)

    def open(self, message: str, now_ms: int) -> None:
        if message not in self._due and len(self._due) < MAX_CONTESTS:
            self._due[message] = (now_ms + CONTEST_MS, frozenset())

    def wait(self, message: str, now_ms: int, waiting_for: frozenset[str]) -> None:
        self._due[message] = (now_ms + CONTEST_MS, waiting_for)

    def close(self, message: str) -> None:
        self._due.pop(message, None)

    def due(self, now_ms: int) -> list[tuple[str, frozenset[str]]]:
        """(message, for whom we have waited)"""
        return [(message, waited_for) for message, (at_ms, waited_for) in self._due.items() if at_ms <= now_ms]

    def next_ms(self) -> int | None:
        """When the next one is due; None: there is none."""
        return min((at_ms for at_ms, _ in self._due.values()), default=None)
