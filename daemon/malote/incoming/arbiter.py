"""Two watchers of one mailbox: whose opened copy stays.

The MOVE of the original decides (design, Incoming): whoever receives its COPYUID won and keeps its copy. Whoever
finds the original gone looks for it in the sealed folder. If it lies there and another watcher's copy of the same message is to
be seen, that watcher won and our copy goes. If the original is elsewhere, a person moved or deleted it, and our copy stays.

What that cannot decide at once is a *contest*: after a crash between MOVE and the note in the store; when a person takes the
original from under two watchers, or files the winner's copy while the loser looks for it; when a server lets two MOVEs of one
message at the same moment both succeed (Dovecot 2.3 with Maildir does: each then finds the other's original in the sealed
folder). It is settled later, when every loser that knows it has gone: the device with the greatest name yields first, any other
one a while after it if there still are two. So two devices never yield to each other.
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


class Settle(Enum):
    KEEP = "keep"
    YIELD = "yield"
    WAIT = "wait"       # for a device with a greater name to yield


def decide_after_lost_move(ours: Mark, copies: Collection[Copy], *, original_is_sealed: bool, late: bool) -> bool:
    """Whether our copy stays for now, after a MOVE that found the original gone; a contest follows then.

    `copies`: all marked copies of this message. `late`: it took long to come here since the MOVE.
    """
    return late or not (original_is_sealed and _others(ours, copies))


def decide_contest(ours: Mark, copies: Collection[Copy], *, last: bool) -> Settle:
    """What becomes of our copy. `last`: the time in which devices with greater names yield is over."""
    others = _others(ours, copies)
    if not others:
        return Settle.KEEP
    return Settle.YIELD if last or all(device < ours.device for device in others) else Settle.WAIT


def _others(ours: Mark, copies: Collection[Copy]) -> set[str]:
    return {copy.mark.device for copy in copies if copy.mark.device != ours.device}


class Contests:
    """Messages of which two devices may have left a copy, each with the time at which it is settled."""

    def __init__(self) -> None:
        self._due: dict[str, tuple[int, bool]] = {}     # first half of the mark -> (ms, whether it is the last time)

    def open(self, message: str, now_ms: int) -> None:
        if message not in self._due and len(self._due) < MAX_CONTESTS:
            self._due[message] = (now_ms + CONTEST_MS, False)

    def wait(self, message: str, now_ms: int) -> None:
        self._due[message] = (now_ms + CONTEST_MS, True)

    def close(self, message: str) -> None:
        self._due.pop(message, None)

    def due(self, now_ms: int) -> list[tuple[str, bool]]:
        """(message, whether it is the last time)"""
        return [(message, last) for message, (at_ms, last) in self._due.items() if at_ms <= now_ms]

    def next_ms(self) -> int | None:
        """When the next one is due; None: there is none."""
        return min((at_ms for at_ms, _ in self._due.values()), default=None)
