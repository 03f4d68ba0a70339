"""The life of a watched account: news, several folders, broken connections, renumbered folders, long catch-ups, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import structlog

from lab.incoming import QUARANTINE, SEALED, Box, note, verdicts
from lab.servers import PASSWORD, Lab
from malote.core.identity import rotate
from malote.errors import ConfigError, KeyMissing, MailboxError, MailboxLost, StoreUnavailable
from malote.incoming import watcher as watcher_module
from malote.incoming.account import account_keys
from malote.incoming.mailbox import Appended, Folder, Mailbox
from malote.incoming.session import BATCH_BYTES, Session, bounded
from malote.incoming.watcher import Watcher, imap_day, now_ms
from malote.store import Store

DAY = 86_400_000


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running(watcher: Watcher) -> AsyncIterator[None]:
    """The watcher at work; stopped at the end, and whatever it raised is raised."""
    task = asyncio.create_task(watcher.run())
    try:
        yield
    finally:
        watcher.stop()
        await asyncio.wait_for(task, 20)


async def test_news_is_opened_as_it_comes(box: Box) -> None:
    """IDLE: a message that arrives while we wait is opened at once; stopping ends the waiting at once."""
    watcher = await box.watcher(await box.open_store())
    async with running(watcher):
        await until(lambda: watcher.state == "watching")
        box.client.put(box.seal())
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"])
        box.client.put(box.seal())
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"] * 2)
    assert watcher.state == "stopped"


async def test_idle_is_begun_again(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `idle_seconds` without news, before a server ends the connection for it (RFC 2177: 29 minutes); on the same one."""
    idle, rounds = Mailbox.idle, []

    async def counted(self: Mailbox, seconds: float) -> bool:
        rounds.append((self, seconds))
        return await idle(self, min(seconds, 0.1))

    monkeypatch.setattr(Mailbox, "idle", counted)
    watcher = await box.watcher(await box.open_store(), idle_seconds=60)
    async with running(watcher):
        await until(lambda: len(rounds) >= 3)
        box.client.put(box.seal())
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"])
    assert {seconds for _, seconds in rounds} == {60}
    assert len({id(mailbox) for mailbox, _ in rounds}) == 1


async def test_polling_where_idle_is_missing(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mailbox, "has_idle", property(lambda self: False))
    watcher = await box.watcher(await box.open_store(), poll_seconds=0.3)
    async with running(watcher):
        await until(lambda: watcher.state == "watching")
        box.client.put(box.seal())
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"])


async def test_several_folders(box: Box) -> None:
    """Server rules may file sealed mail anywhere: each folder is looked at, names with any characters, \\Junk by its use.
    Each opened message stays in the folder where it came; a folder that is not there is passed over."""
    box.client.imap.create('"Entw&APw-rfe &- mehr"')
    box.client.put(box.seal(), "Spam")
    box.client.put(box.seal(), "Entw&APw-rfe &- mehr")
    watcher = await box.watcher(await box.open_store(), poll_seconds=0.3,
                                folders=("INBOX", "\\Junk", "Entwürfe & mehr", "Nowhere"))
    async with running(watcher):
        await until(lambda: verdicts(box.client.messages("Spam")) == ["FRESH"])
        await until(lambda: verdicts(box.client.messages("Entw&APw-rfe &- mehr")) == ["FRESH"])
        await until(lambda: watcher.state == "watching")
        box.client.put(box.seal(), "Spam")
        await until(lambda: verdicts(box.client.messages("Spam")) == ["FRESH"] * 2)
    assert len(box.client.uids(SEALED)) == 3


async def test_the_server_goes_away_and_comes_back(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost connection is noticed, tried again with growing pauses, and nothing is missed or doubled."""
    monkeypatch.setattr(watcher_module, "RECONNECT_FIRST_SECONDS", 0.05)
    user = f"{uuid.uuid4().hex}@test.example"
    dovecot = lab.dovecot([user])
    box = Box(dovecot, tmp_path, user)
    watcher = await box.watcher(await box.open_store())
    with structlog.testing.capture_logs() as logs:
        async with running(watcher):
            await until(lambda: watcher.state == "watching")
            box.client.put(box.seal())
            await until(lambda: verdicts(box.client.messages()) == ["FRESH"])
            box.client.close()
            await asyncio.to_thread(dovecot.stop)
            await until(lambda: watcher.state == "waiting")
            assert watcher.last_error
            await asyncio.to_thread(dovecot.start)
            box.client = type(box.client)(dovecot.port, user)
            box.client.put(box.seal())
            await until(lambda: verdicts(box.client.messages()) == ["FRESH"] * 2)
    assert next(line["fault"] for line in logs if line["event"] == "mailbox not available") == "MailboxLost"
    assert len(box.client.uids(SEALED)) == 2
    await box.close()


async def test_a_wrong_password_is_not_hammered(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused logins: pauses that grow, so that no server locks the account."""
    monkeypatch.setattr(watcher_module, "RECONNECT_FIRST_SECONDS", 0.01)
    watcher = await box.watcher(await box.open_store())
    asked: list[float] = []

    async def wrong() -> str:
        asked.append(asyncio.get_running_loop().time())
        return "wrong"

    watcher._password = wrong
    sleeps: list[float] = []
    sleep = watcher._sleep

    async def noted(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(min(seconds, 0.01))

    monkeypatch.setattr(watcher, "_sleep", noted)
    async with running(watcher):
        await until(lambda: len(sleeps) >= 3, 60)
    assert len(asked) >= 3
    assert sleeps[2] > sleeps[0]


async def test_a_renumbered_folder_is_looked_at_again(box: Box) -> None:
    """UIDVALIDITY changes: everything is found again, nothing is opened twice, what is new is opened."""
    store = await box.open_store()
    box.client.imap.create("Work")
    box.client.put(box.seal(), "Work")
    await (await box.watcher(store, folders=("Work",))).run_once()
    opened = box.client.fetch("Work")
    box.client.select()
    box.client.imap.delete("Work")
    box.client.imap.create("Work")
    box.client.put(opened[0], "Work")
    box.client.put(box.seal(), "Work")
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(store, folders=("Work",))).run_once()
    assert verdicts(box.client.messages("Work")) == ["FRESH", "FRESH"]
    assert any("renumbered" in line["event"] for line in logs)
    assert box.client.uids(QUARANTINE) == []


@pytest.mark.parametrize("when", ["before the copy is stored", "after it is verified"])
async def test_a_folder_that_is_replaced_while_we_are_elsewhere(box: Box, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Its UIDs name other messages when we come back: what is there now is neither moved away nor taken for the original."""
    box.client.imap.create("Work")
    box.client.put(box.seal(), "Work")
    append_many, fetch_new = Mailbox.append_many, Session.fetch_new
    done: list[bool] = []

    def replace_folder() -> None:
        if not done:
            done.append(True)
            box.client.select()
            box.client.imap.delete("Work")
            box.client.imap.create("Work")
            box.client.put(note("another"), "Work")

    async def before(self: Mailbox, *arguments: object) -> object:
        if when == "before the copy is stored":
            await self.select("INBOX")
            replace_folder()
        return await append_many(self, *arguments)      # type: ignore[arg-type]

    async def after(self: Session, *arguments: object) -> object:
        found = await fetch_new(self, *arguments)       # type: ignore[arg-type]
        replace_folder()
        return found

    monkeypatch.setattr(Mailbox, "append_many", before)
    monkeypatch.setattr(Session, "fetch_new", after)
    store = await box.open_store()
    watcher = await box.watcher(store, folders=("Work",), deliver="folder")
    with pytest.raises(MailboxLost):
        await watcher.run_once()
    await watcher.run_once()
    assert [message["Subject"] for message in box.client.messages("Work")] == ["another"]
    assert box.client.uids(SEALED) == []
    assert verdicts(box.client.messages("Malote/Opened")) == ["FRESH"]


@pytest.mark.parametrize("same_uidvalidity", [True, False])
async def test_a_message_that_is_not_our_copy_is_never_deleted(box: Box, monkeypatch: pytest.MonkeyPatch,
                                                               same_uidvalidity: bool) -> None:
    """APPENDUID names a message of another time of the folder, or the server is wrong: what lies there is somebody else's."""
    box.client.put(box.seal())
    box.client.put(note("another"))
    append_many = Mailbox.append_many

    async def wrong(self: Mailbox, *arguments: object) -> list[Appended | MailboxError | None]:
        outcomes = await append_many(self, *arguments)      # type: ignore[arg-type]
        return [Appended(outcome.uidvalidity + (not same_uidvalidity), 2) if isinstance(outcome, Appended) else outcome
                for outcome in outcomes]

    monkeypatch.setattr(Mailbox, "append_many", wrong)
    await (await box.watcher(await box.open_store())).run_once()
    assert "another" in [message["Subject"] for message in box.client.messages()]
    assert verdicts(box.client.messages()) == ["None", "FRESH"]
    assert len(box.client.uids(SEALED)) == 1


@pytest.mark.parametrize("deliver", ["replace", "folder", "maildir"])
async def test_an_original_that_the_server_does_not_move(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         deliver: str) -> None:
    """It was opened: it is tried again to move it away, and never opened a second time, whatever the server takes long for."""
    box.client.put(box.seal())
    move, late = Mailbox.move, [0]

    async def refused(*_arguments: object) -> dict[int, int]:
        raise MailboxError("refused", code="NOPERM")

    monkeypatch.setattr(Mailbox, "move", refused)
    store, directory = await box.open_store(), tmp_path / "mail"
    watcher = await box.watcher(store, deliver=deliver, maildir=directory, clock=lambda: now_ms() + late[0])

    def opened() -> int:
        if deliver == "maildir":
            return len(list((directory / "new").iterdir()))
        return verdicts(box.client.messages("INBOX" if deliver == "replace" else "Malote/Opened")).count("FRESH")

    for number in range(1, 4):
        await watcher.run_once()
        assert opened() == 1
        [attempt] = await store.attempts("box", "INBOX")
        assert (attempt.count, attempt.reason) == (number, "NOPERM")
        late[0] += DAY
    monkeypatch.setattr(Mailbox, "move", move)
    await watcher.run_once()
    assert opened() == 1
    assert len(box.client.uids(SEALED) + box.client.uids(QUARANTINE)) == 1
    assert await store.attempts("box", "INBOX") == []


async def test_flags_that_cannot_be_set_do_not_stop_the_folder(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person flags the original meanwhile and the server does not let us follow: the message is opened all the same."""
    box.client.put(box.seal())
    fetch_new = Session.fetch_new

    async def flagged(self: Session, *arguments: object) -> object:
        found = await fetch_new(self, *arguments)       # type: ignore[arg-type]
        box.client.select()
        box.client.imap.uid("STORE", "1", "+FLAGS", "\\Flagged")
        return found

    async def refused(self: Mailbox, *_arguments: object, **_options: object) -> None:
        raise MailboxError("refused", code="NOPERM")

    monkeypatch.setattr(Session, "fetch_new", flagged)
    monkeypatch.setattr(Mailbox, "store_flags", refused)
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(await box.open_store())).run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
    assert len(box.client.uids(SEALED)) == 1
    assert [line["code"] for line in logs if line["event"] == "flags not followed"] == ["NOPERM"]


async def test_catching_up_fetches_only_what_can_be_sealed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mailbox full of ordinary mail with a few sealed: whole messages are fetched only of those, in batches, with a
    progress line; a catch-up that is broken off goes on where it was."""
    monkeypatch.setattr(watcher_module, "BATCH_MESSAGES", 4)
    monkeypatch.setattr(watcher_module, "PROGRESS_SECONDS", 0.0)
    plain = note("plain", body="x" * 9000 + "\r\n")
    mixed = (b"From: a@b.example\r\nSubject: two files\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
             + (b"--b\r\nContent-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n" + b"JVBERi0x\r\n" * 600) * 2
             + b"--b--\r\n")
    for number in range(300):
        box.client.put(mixed if number % 10 == 0 else plain)
        if number % 30 == 0:
            box.client.put(box.seal())
    fetched: list[int] = []
    fetch_many = Mailbox.fetch_many

    def counting(self: Mailbox, uids: object, **options: object) -> object:
        wanted = list(uids)         # type: ignore[call-overload]
        if self.selected is not None and self.selected.folder.name == "INBOX":
            fetched.extend(wanted)
        return fetch_many(self, wanted, **options)      # type: ignore[arg-type]

    monkeypatch.setattr(Mailbox, "fetch_many", counting)
    watcher = await box.watcher(await box.open_store())
    with structlog.testing.capture_logs() as logs:
        await watcher.run_once()
    assert verdicts(box.client.messages()).count("FRESH") == 10
    assert len(fetched) == 20, "ten sealed ones, and their opened copies to verify them"
    progress = [(line["done"], line["total"]) for line in logs if line["event"] == "catching up"]
    assert progress == [(4, 10), (8, 10), (10, 10)]
    fetched.clear()
    await watcher.run_once()
    assert fetched == [], "our own copies are known"


async def test_a_catch_up_that_is_broken_off_goes_on(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "BATCH_MESSAGES", 3)
    store = await box.open_store()
    for number in range(7):
        box.client.put(box.seal(note(f"number {number}", to=box.user)))
    first = await box.watcher(store)
    move = Mailbox.move

    async def last(self: Mailbox, *arguments: object, **options: object) -> object:
        first.stop()
        return await move(self, *arguments, **options)      # type: ignore[arg-type]

    monkeypatch.setattr(Mailbox, "move", last)
    await first.run()
    assert len(box.client.uids(SEALED)) == 3, "the batch under way is finished"
    monkeypatch.undo()
    await (await box.watcher(store)).run_once()
    assert len(box.client.uids(SEALED)) == 7
    assert sorted(message["Subject"] for message in box.client.messages()) == [f"number {number}" for number in range(7)]


async def test_keys_that_come_while_we_watch(box: Box) -> None:
    """A key that is added opens what waited for it, without a restart."""
    new = rotate(box.identity, now_ms())
    watcher = await box.watcher(await box.open_store())
    keys = [account_keys([box.identity], (box.user,))]
    watcher._keys = lambda: keys[0]
    async with running(watcher):
        box.client.put(box.sender.seal(note(to=box.user), new))
        await until(lambda: "$MaloteUnreadable" in str(box.client.uids() and box.client.status_of(1)))
        keys[0] = account_keys([new], (box.user,))
        watcher.look_now()
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"])


async def test_without_any_key_nothing_is_touched(box: Box) -> None:
    """Without keys we could not tell our own headers from forged ones: the account waits for a key."""
    box.client.put(b"Malote-Verdict: FRESH\r\n" + note())
    watcher = await box.watcher(await box.open_store(), identities=[])
    with pytest.raises(KeyMissing):
        await watcher.run_once()
    assert len(box.client.uids()) == 1


async def test_maildir_needs_a_directory(box: Box) -> None:
    with pytest.raises(ConfigError):
        await (await box.watcher(await box.open_store(), deliver="maildir")).run()


async def test_sealed_originals_are_kept_as_long_as_configured(box: Box) -> None:
    """Older ones go, by the date on which they came; younger ones and unrecorded ones stay; no verdict suffers."""
    store = await box.open_store()
    box.client.put(box.seal(), date=imap_day(now_ms() - 40 * DAY) + " 10:00:00 +0000")
    box.client.put(box.seal())
    await (await box.watcher(store, keep_sealed_days=0)).run_once()
    assert len(box.client.uids(SEALED)) == 2
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(store, keep_sealed_days=30)).run_once()
    assert len(box.client.uids(SEALED)) == 1
    assert any(line["event"] == "old sealed originals deleted" and line["count"] == 1 for line in logs)
    box.client.put(box.seal())
    await (await box.watcher(store, keep_sealed_days=30)).run_once()
    assert verdicts(box.client.messages())[-1] == "FRESH"


async def test_a_fault_in_the_watcher_does_not_end_it(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw: logged by class and line, and the account goes on."""
    monkeypatch.setattr(watcher_module, "RECONNECT_FIRST_SECONDS", 0.01)
    find = watcher_module.find_candidates
    faults = ["secret words"]

    async def faulty(*arguments: object, **options: object) -> object:
        if faults:
            raise RuntimeError(faults.pop())
        return await find(*arguments, **options)    # type: ignore[arg-type]

    monkeypatch.setattr(watcher_module, "find_candidates", faulty)
    box.client.put(box.seal())
    with structlog.testing.capture_logs() as logs:
        async with running(await box.watcher(await box.open_store())):
            await until(lambda: verdicts(box.client.messages()) == ["FRESH"])
    [line] = [line for line in logs if line["event"] == "fault in the watcher"]
    assert line["fault"] == "RuntimeError"
    assert "secret words" not in str(logs)


async def test_no_other_folder_is_selected_while_reading_ahead(box: Box) -> None:
    """UIDs mean other messages in another folder: what is being fetched from one must be there before it is left."""
    box.client.put(note("inbox"))
    box.client.put(note("draft"), "Drafts")

    async def password() -> str:
        return PASSWORD

    mailbox = await Mailbox.connect(box.config(), password=password)
    session = Session(mailbox)
    inbox, drafts = await mailbox.resolve("INBOX"), await mailbox.resolve("Drafts")
    assert inbox is not None
    assert drafts is not None
    await session.enter(inbox)
    go = asyncio.Event()

    async def read() -> list[bytes]:
        await go.wait()
        return [fetched.raw for fetched in await session.fetch_all([1])]

    reading = session.ahead(asyncio.create_task(read()))
    leaving = asyncio.create_task(session.enter(drafts))
    await asyncio.sleep(0.1)
    assert not leaving.done()
    go.set()
    assert (await leaving).folder.name == "Drafts"
    assert b"Subject: inbox" in (await reading)[0]
    await mailbox.logout()


def test_batches_are_bounded() -> None:
    """In number, and in bytes, but one message always goes."""
    uids = [1, 2, 3, 4]
    assert bounded(uids, {}, 0, 3) == 3
    assert bounded(uids, {}, 3, 3) == 4
    assert bounded(uids, {1: BATCH_BYTES, 2: 1}, 0, 3) == 1
    assert bounded(uids, {1: BATCH_BYTES * 2, 2: 1}, 0, 3) == 1


def test_imap_day() -> None:
    assert imap_day(1_767_744_000_000) == "7-Jan-2026"


async def test_a_store_that_fails_for_a_while(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full or locked: nothing is delivered without its judgement being written down; later everything is, once."""
    monkeypatch.setattr(watcher_module, "RECONNECT_FIRST_SECONDS", 0.01)
    judge, failing = Store.judge, [True]
    seen_in_inbox: list[list[str]] = []

    async def full(self: Store, *arguments: object, **more: object) -> object:
        if failing:
            failing.pop()
            seen_in_inbox.append(verdicts(box.client.messages()))
            raise StoreUnavailable("full")
        return await judge(self, *arguments, **more)        # type: ignore[arg-type]

    monkeypatch.setattr(Store, "judge", full)
    for _ in range(3):
        box.client.put(box.seal())
    async with running(await box.watcher(await box.open_store())):
        await until(lambda: verdicts(box.client.messages()) == ["FRESH"] * 3)
    assert seen_in_inbox == [["None"] * 3]
    assert len(box.client.uids(SEALED)) == 3
    assert box.client.uids(QUARANTINE) == []


async def test_a_folder_that_cannot_be_read_does_not_stop_the_others(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission, a damaged index: said in the log, and the other folders are looked at all the same."""
    enter = Session.enter

    async def refused(self: Session, folder: Folder, *, fresh: bool = False) -> object:
        if folder.name == "Spam":
            raise MailboxError("refused", code="NOPERM")
        return await enter(self, folder, fresh=fresh)

    monkeypatch.setattr(Session, "enter", refused)
    box.client.put(box.seal())
    watcher = await box.watcher(await box.open_store(), folders=("\\Junk", "INBOX"))
    with structlog.testing.capture_logs() as logs:
        await watcher.run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
    assert [line["code"] for line in logs if line["event"] == "folder not available"] == ["NOPERM"]
    assert watcher.last_error
