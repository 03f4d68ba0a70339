"""What watchers remember, the outcome log and the outer Message-IDs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from malote.store import Attempt, FolderState, OutcomeEntry, Store
from malote.store.accounts import MAX_OUTCOMES
from malote.store.records import KnownMessage

DAY_MS = 86_400_000


async def test_folder_state(store: Store) -> None:
    assert await store.folder_state("home", "INBOX") is None
    for state in (FolderState(7, 100, 5000), FolderState(8, 1, 6000)):
        await store.set_folder_state("home", "INBOX", state)
        assert await store.folder_state("home", "INBOX") == state
    assert await store.folder_state("work", "INBOX") is None


async def test_a_name_that_is_not_unicode(store: Store) -> None:
    """Half a surrogate pair, from a folder name in modified UTF-7: found again, and no other name is taken for it."""
    await store.set_folder_state("home", "\ud800", FolderState(7, 100, 5000))
    assert await store.folder_state("home", "\ud800") == FolderState(7, 100, 5000)
    assert await store.folder_state("home", "\ud801") is None


async def test_attempts_are_counted_until_cleared(store: Store, now_ms: int) -> None:
    first = Attempt("home", "INBOX", 7, 41, 1, now_ms + 1000, "Unreadable")
    await store.put_attempt(first, now_ms)
    second = Attempt("home", "INBOX", 7, 41, 2, now_ms + 2000, "MailboxError")
    await store.put_attempt(second, now_ms)
    assert await store.attempts("home", "INBOX") == [second]
    assert await store.attempts("home", "Junk") == []
    await store.clear_attempt("home", "INBOX", 7, 41)
    assert await store.attempts("home", "INBOX") == []


async def test_recent_outcomes_are_newest_first(store: Store) -> None:
    entries = [OutcomeEntry(number, "in", "opened", "home", "ab", "anna@a.example", 1, "FRESH", "", 12) for number in range(5)]
    for entry in entries:
        store.log_outcome(entry)
    await store.flush()
    assert await store.recent_outcomes(3) == entries[:1:-1]


async def test_known_messages(sqlite_store: Store, now_ms: int, tmp_path: Path) -> None:
    """Found by the inner id; the inner id itself, which others do not know, is not in the file."""
    sqlite_store.remember_outer_id("<inner-1@a.example>", "<outer-1@a.example>", now_ms, {"anna@a.example"})
    await sqlite_store.flush()
    found = await sqlite_store.known_messages(["<inner-1@a.example>", "<inner-2@a.example>"])
    assert {inner: known.outer_id for inner, known in found.items()} == {"<inner-1@a.example>": "<outer-1@a.example>"}
    assert await sqlite_store.known_messages([]) == {}
    await sqlite_store.close()
    raw = sqlite3.connect(tmp_path / "store" / "store.sqlite")
    dump = "\n".join(raw.iterdump())
    raw.close()
    assert "inner-1" not in dump
    assert "anna" not in dump
    assert "outer-1" in dump


async def test_who_had_part_in_an_opened_message(store: Store, now_ms: int) -> None:
    """What was said first counts: whoever can make a message of the same id must not get himself among them. What was only sent,
    or is not proven, names nobody and takes nothing away."""
    async def known() -> KnownMessage:
        await store.flush()
        return (await store.known_messages(["<m@a.example>"]))["<m@a.example>"]
    store.remember_outer_id("<m@a.example>", "<outer@a.example>", now_ms)
    assert (await known()).had_part("anybody@else.example"), "not opened here"
    store.remember_outer_id("<m@a.example>", "<outer@a.example>", now_ms, {"anna@a.example", "j\u00f6rg@b.example"})
    store.remember_outer_id("<m@a.example>", "", now_ms)
    store.remember_outer_id("<m@a.example>", "", now_ms, {"mallory@evil.example"})
    message = await known()
    assert message.outer_id == "<outer@a.example>"
    assert [message.had_part(each) for each in ("anna@a.example", "j\u00f6rg@b.example", "mallory@evil.example", "")] == [
        True, True, False, False]
    store.remember_outer_id("<n@a.example>", "<o@a.example>", now_ms, {"anna@a.example"})
    await store.flush()
    other = (await store.known_messages(["<n@a.example>"]))["<n@a.example>"]
    assert message.participants
    assert other.participants
    assert not message.participants & other.participants, "nobody can tell that it is the same person"


async def test_everything_that_grows_expires(store: Store, now_ms: int) -> None:
    await store.put_attempt(Attempt("home", "INBOX", 7, 41, 1, now_ms, "Unreadable"), now_ms)
    store.remember_outer_id("<inner@a.example>", "<outer@a.example>", now_ms)
    for number in range(MAX_OUTCOMES + 50):
        store.log_outcome(OutcomeEntry(number, "in", "opened"))
        if number % 1000 == 999:
            await store.flush()
    await store.flush()
    await store.expire(now_ms)
    assert len(await store.attempts("home", "INBOX")) == 1
    assert len(await store.recent_outcomes(10**6)) == MAX_OUTCOMES
    await store.expire(now_ms + 401 * DAY_MS)
    assert await store.attempts("home", "INBOX") == []
    assert await store.known_messages(["<inner@a.example>"]) == {}
