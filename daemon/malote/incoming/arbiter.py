"""Two watchers of one mailbox: whose opened copy stays.

The MOVE of the original decides (design, Incoming): whoever receives its COPYUID won and keeps its copy for good. Whoever
finds the original gone looks for it in the sealed folder. If it lies there and another watcher's copy of the same message is
to be seen, that watcher won and our copy goes. If the original is elsewhere, a person moved or deleted it, and our copy stays.

What COPYUID cannot decide is a crash between MOVE and the note in the store, and a person who moves the original away from two
watchers at once: then two marked copies stay behind. A *contest* settles it after a time in which every loser that knows it
lost has gone: the device with the greater name removes its copy, if the other one is still there at that moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from malote.incoming.account import Mark

# A loser removes its copy within one round trip of its MOVE. After this time it no longer does so by itself, and whatever two
# copies are left are nobody's winner that is still at work.
CONTEST_MS = 30_000
MAX_CONTESTS = 10_000       # a hostile server can show as many marked copies as it likes
MAX_DELIVERED = 10_000      # of what was delivered lately: about 100 bytes each


@dataclass(frozen=True, slots=True)
class Copy:
    """One opened copy in a folder."""

    mark: Mark
    uid: int


def decide_after_lost_move(ours: Mark, copies: Iterable[Copy], *, original_is_sealed: bool, late: bool) -> bool:
    """Whether our copy stays after a MOVE that found the original gone.

    `copies`: all marked copies of this message where opened mail goes. `late`: the answer to the MOVE is older than half of
    `CONTEST_MS`; then nothing is removed here, a contest decides.
    """
    others = any(copy.mark.device != ours.device for copy in copies)
    return late or not (original_is_sealed and others)


def decide_contest(ours: Mark, copies: Iterable[Copy]) -> bool:
    """Whether our copy stays: it does unless a device with a smaller name has one."""
    return not any(copy.mark.device < ours.device for copy in copies)


class Contests:
    """Messages of which two devices may have left a copy, each with the time at which it is settled."""

    def __init__(self) -> None:
        self._due: dict[str, int] = {}      # first half of the mark -> ms
        self._delivered: OrderedDict[str, None] = OrderedDict()     # first halves of marks of copies that we have made lately

    def note_delivered(self, message: str) -> None:
        self._delivered[message] = None
        if len(self._delivered) > MAX_DELIVERED:
            self._delivered.popitem(last=False)

    def note_other(self, message: str, now_ms: int) -> None:
        """Another device's copy was seen: contested if we have made one too."""
        if message in self._delivered:
            self.open(message, now_ms)

    def open(self, message: str, now_ms: int) -> None:
        if message not in self._due and len(self._due) < MAX_CONTESTS:
            self._due[message] = now_ms + CONTEST_MS

    def due(self, now_ms: int) -> list[str]:
        return [message for message, at_ms in self._due.items() if at_ms <= now_ms]

    def close(self, message: str) -> None:
        self._due.pop(message, None)

    def next_ms(self) -> int | None:
        """When the next one is due; None: there is none."""
        return min(self._due.values(), default=None)
