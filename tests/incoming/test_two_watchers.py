"""Two devices on one mailbox, and a person's own client in between: at rest there is exactly one copy of everything."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from lab.incoming import QUARANTINE, SEALED, Box, Client, note, verdicts
from malote.incoming.account import Mark
from malote.incoming.arbiter import CONTEST_MS, Copy, Settle, decide_after_lost_move, decide_contest
from malote.incoming.mailbox import Folder, Mailbox
from malote.incoming.watcher import Watcher, now_ms

SMALL, LARGE = "0" * 16, "f" * 16


def before(monkeypatch: pytest.MonkeyPatch, watcher: Watcher, method: str, action: Callable[[], Awaitable[object]]) -> None:
    """Do something else just before the first call of a mailbox method by this watcher."""
    original = getattr(Mailbox, method)
    waiting = [action]

    async def replaced(self: Mailbox, *arguments: object, **options: object) -> object:
        if waiting and self._account is watcher.account:
            await waiting.pop()()
        return await original(self, *arguments, **options)

    monkeypatch.setattr(Mailbox, method, replaced)


async def test_both_at_once(box: Box) -> None:
    """Thirty messages, two watchers started together; when both are at rest each message is there once, opened, fresh.

    Dovecot may let both move one original: then two copies are seen until the contest's time is over, and the original lies
    twice in Malote/Sealed.
    """
    late = [0]
    clock = lambda: now_ms() + late[0]      # noqa: E731
    first = await box.watcher(await box.open_store("a"), device=SMALL, clock=clock)
    second = await box.watcher(await box.open_store("b"), device=LARGE, clock=clock)
    for number in range(30):
        box.client.put(box.seal(note(f"number {number}", to=box.user)))
    for _ in range(4):
        await asyncio.gather(first.run_once(), second.run_once())
        late[0] += CONTEST_MS + 1000
    opened = box.client.messages()
    assert Counter(message["Subject"] for message in opened) == {f"number {number}": 1 for number in range(30)}
    assert verdicts(opened) == ["FRESH"] * 30
    originals = Counter(box.client.fetch(SEALED))
    assert len(originals) == 30
    assert max(originals.values()) <= 2
    assert box.client.uids(QUARANTINE) == []


@pytest.mark.parametrize("deliver", ["replace", "folder"])
async def test_who_loses_the_move_takes_its_copy_back(box: Box, monkeypatch: pytest.MonkeyPatch, deliver: str) -> None:
    """The second opens and moves everything while the first is between judgement and APPEND, or between APPEND and MOVE."""
    first = await box.watcher(await box.open_store("a"), deliver=deliver)
    second = await box.watcher(await box.open_store("b"), deliver=deliver)
    target = "INBOX" if deliver == "replace" else "Malote/Opened"
    for method in ("append_many", "move"):
        box.client.put(box.seal(note(method, to=box.user)))
        before(monkeypatch, first, method, second.run_once)
        await first.run_once()
        monkeypatch.undo()
    await first.run_once()
    assert [message["Subject"] for message in box.client.messages(target)] == ["append_many", "move"]
    assert verdicts(box.client.messages(target)) == ["FRESH"] * 2
    assert len(box.client.uids(SEALED)) == 2
    assert box.client.uids(QUARANTINE) == []


@pytest.mark.parametrize("comes_back", [False, True])
@pytest.mark.parametrize("dead", [SMALL, LARGE])
async def test_the_copy_of_a_dead_device(box: Box, monkeypatch: pytest.MonkeyPatch, dead: str, comes_back: bool) -> None:
    """The first has stored its copy and was switched off before the MOVE: the second adds its own, since it cannot know whether
    the first still takes its copy back, and moves the original. After the contest's time one is left, the first back or not."""
    late = [0]
    clock = lambda: now_ms() + late[0]      # noqa: E731
    first = await box.watcher(await box.open_store("a"), device=dead, clock=clock)
    second = await box.watcher(await box.open_store("b"), device=SMALL if dead == LARGE else LARGE, clock=clock)
    box.client.put(box.seal())

    async def switched_off() -> None:
        raise ConnectionAbortedError

    before(monkeypatch, first, "move", switched_off)
    with pytest.raises(ConnectionAbortedError):
        await first.run_once()
    monkeypatch.undo()
    await second.run_once()
    assert verdicts(box.client.messages()) == ["FRESH"] * 2, "for the moment"
    assert len(box.client.uids(SEALED)) == 1
    for _ in range(3):
        late[0] += CONTEST_MS + 1000
        await second.run_once()
        if comes_back:
            await first.run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
    assert box.client.uids(QUARANTINE) == []


@pytest.mark.parametrize("crashed", [SMALL, LARGE])
async def test_two_copies_after_a_crash_are_settled(box: Box, monkeypatch: pytest.MonkeyPatch, crashed: str) -> None:
    """One dies between APPEND and MOVE while the other does the same and wins: after the contest's time one copy is left."""
    late = [0]
    winner = await box.watcher(await box.open_store("b"), device=SMALL if crashed == LARGE else LARGE,
                               clock=lambda: now_ms() + late[0])
    loser = await box.watcher(await box.open_store("a"), device=crashed, clock=lambda: now_ms() + late[0])
    box.client.put(box.seal())

    async def dies() -> None:
        async def switched_off() -> None:
            raise ConnectionAbortedError
        before(monkeypatch, loser, "move", switched_off)
        with pytest.raises(ConnectionAbortedError):
            await loser.run_once()

    before(monkeypatch, winner, "append_many", dies)
    await winner.run_once()
    monkeypatch.undo()
    assert verdicts(box.client.messages()) == ["FRESH"] * 2, "for the moment"
    for _ in range(3):
        await loser.run_once()
        await winner.run_once()
        late[0] += CONTEST_MS + 1000
    assert verdicts(box.client.messages()) == ["FRESH"]
    assert len(box.client.uids(SEALED)) == 1
    assert box.client.uids(QUARANTINE) == []


@pytest.mark.parametrize("smaller", ["a", "b"])
async def test_a_server_that_lets_two_moves_succeed(box: Box, monkeypatch: pytest.MonkeyPatch, smaller: str) -> None:
    """Dovecot with Maildir may give COPYUID to two devices for one message: both then believe that they have won."""
    late = [0]
    clock = lambda: now_ms() + late[0]      # noqa: E731
    first = await box.watcher(await box.open_store("a"), device=SMALL if smaller == "a" else LARGE, clock=clock)
    second = await box.watcher(await box.open_store("b"), device=SMALL if smaller == "b" else LARGE, clock=clock)
    for watcher in (first, second):     # each has seen the folders before
        box.client.put(box.seal(note("earlier", to=box.user)))
        await watcher.run_once()
    raw = box.seal(note("twice", to=box.user))
    box.client.put(raw)

    async def wins_too() -> None:
        await second.run_once()
        box.client.put(raw)             # the original that the first is about to move is still there for it
        monkeypatch.setattr(Mailbox, "move", moves_anyway)

    move = Mailbox.move

    async def moves_anyway(self: Mailbox, uids: object, folder: object) -> dict[int, int]:
        asked = list(uids)      # type: ignore[call-overload]
        moved = await move(self, await self.search("HEADER Malote 1"), folder)      # type: ignore[arg-type]
        return dict(zip(asked, moved.values(), strict=True))

    before(monkeypatch, first, "append_many", wins_too)
    await first.run_once()
    monkeypatch.undo()
    assert [message["Subject"] for message in box.client.messages()].count("twice") == 2, "for the moment"
    for _ in range(3):
        await first.run_once()
        await second.run_once()
        late[0] += CONTEST_MS + 1000
    assert [message["Subject"] for message in box.client.messages()].count("twice") == 1
    assert box.client.uids(QUARANTINE) == []


def test_the_arbiter() -> None:
    """Who lost for certain goes at once; in doubt the greatest name goes first, and never two at the same time."""
    inbox = Folder("INBOX", b"INBOX")
    ours, other = Mark("a" * 32, SMALL), Mark("a" * 32, LARGE)
    both, own = [Copy(ours, inbox, 1), Copy(other, inbox, 2)], [Copy(ours, inbox, 1)]
    assert not decide_after_lost_move(ours, both, original_is_sealed=True, late=False)
    assert decide_after_lost_move(ours, both, original_is_sealed=False, late=False), "a person moved it"
    assert decide_after_lost_move(ours, own, original_is_sealed=True, late=False), "no other copy: ours is the only one"
    assert decide_after_lost_move(ours, both, original_is_sealed=True, late=True), "a contest decides"
    assert decide_contest(other, both) is Settle.YIELD
    assert decide_contest(ours, both) is Settle.WAIT
    assert decide_contest(ours, both, waited_for=frozenset({LARGE})) is Settle.YIELD, "the other one has won, it stays"
    third = Mark("a" * 32, "8" * 16)
    three = [*both, Copy(third, inbox, 3)]
    assert decide_contest(ours, three, waited_for=frozenset({LARGE})) is Settle.WAIT, "a new one: it may know of the contest"
    assert decide_contest(ours, [*own, Copy(third, inbox, 3)], waited_for=frozenset({third.device, LARGE})) is Settle.WAIT, \
        "one has yielded, and the next one is about to"
    assert decide_contest(ours, [*own, Copy(other, inbox, 2, discarded=True)]) is Settle.KEEP, "a person threw the other one away"
    assert decide_contest(ours, own, waited_for=frozenset({LARGE})) is Settle.KEEP


class Person:
    """Somebody who reads, flags, files and deletes mail while two watchers are at work."""

    def __init__(self, box: Box, seed: int) -> None:
        self.client = Client(box.dovecot.port, box.user)
        self.client.imap.create("Filed")
        self.random = random.Random(seed)
        self.deleted: set[str] = set()

    def act(self) -> None:
        uids = self.client.uids()
        if not uids:
            return
        uid = str(self.random.choice(uids))
        match self.random.choice(["flag", "read", "file", "delete"]):
            case "flag":
                self.client.imap.uid("STORE", uid, "+FLAGS", "\\Flagged")
            case "read":
                self.client.imap.uid("FETCH", uid, "(BODY[])")
            case "file":
                self.client.imap.uid("MOVE", uid, "Filed")
            case "delete":
                _, data = self.client.imap.uid("FETCH", uid, "(BODY.PEEK[HEADER.FIELDS (Subject X-Number)])")
                if data and isinstance(data[0], tuple):     # else it is gone already
                    self.client.imap.uid("STORE", uid, "+FLAGS", "\\Deleted")
                    self.client.imap.uid("EXPUNGE", uid)
                    self.deleted.add(data[0][1].decode())


RUNS = [(1, 2), *(pytest.param(seed, devices, marks=pytest.mark.long) for seed in range(2, 9) for devices in (2, 3))]


@pytest.mark.parametrize(("seed", "devices"), RUNS)
async def test_watchers_and_a_person(box: Box, seed: int, devices: int) -> None:
    """Whatever a person does meanwhile, no message has two opened copies, and none is lost that the person did not delete."""
    began = now_ms()
    clock = lambda: began + (now_ms() - began) * 10     # noqa: E731 -- contests are settled in three seconds
    watchers = [await box.watcher(await box.open_store(name), clock=clock, late_days=30, idle_seconds=0.5)
                for name in "abc"[:devices]]
    running = [asyncio.create_task(watcher.run()) for watcher in watchers]
    person = Person(box, seed)
    raws: dict[str, bytes] = {}
    for number in range(24):
        raw = b"X-Number: %d\r\n" % number + box.seal(note(f"number {number}", to=box.user), sent_at_ms=clock())
        raws[f"number {number}"] = raw
        box.client.put(raw)
        for _ in range(2):
            await asyncio.to_thread(person.act)
            await asyncio.sleep(person.random.random() / 20)
    deadline = time.monotonic() + 40
    quiet = 0
    while quiet < 6 and time.monotonic() < deadline:     # each device has looked again meanwhile, and nothing is in doubt
        await asyncio.sleep(0.5)
        at_rest = all(watcher._contests.next_ms() is None for watcher in watchers)
        quiet = quiet + 1 if at_rest and not any(message["Malote"] for message in box.client.messages()) else 0
    for watcher in watchers:
        watcher.stop()
    await asyncio.gather(*running)
    person.client.close()
    visible = [message for folder in ("INBOX", "Filed") for message in box.client.messages(folder)]
    opened = Counter(str(message["Subject"]) for message in visible if message["Malote-Verdict"])
    assert set(opened.values()) <= {1}
    assert set(verdicts([message for message in visible if message["Malote-Verdict"]])) <= {"FRESH"}
    filed_sealed = {str(message["X-Number"]) for message in visible if message["Malote"]}
    for number in range(24):
        gone = f"Subject: number {number}\r\n" in "".join(person.deleted) or f"X-Number: {number}\r\n" in "".join(person.deleted)
        assert opened[f"number {number}"] == 1 or str(number) in filed_sealed or gone
    assert box.client.uids(QUARANTINE) == []
