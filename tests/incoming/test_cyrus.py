"""The watcher on a real Cyrus IMAP: what Dovecot takes and Cyrus does not must arrive all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

from lab.daemon import Home, account
from lab.incoming import QUARANTINE, SEALED, Box, note, verdict, verdicts, wait_until
from lab.servers import Lab
from lab.unpacked import MISSING, Cyrus
from malote.incoming.mailbox import Mailbox
from malote.incoming.watcher import now_ms

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
_numbers = count()


@pytest.fixture(scope="module")
def cyrus(lab: Lab) -> Iterator[Cyrus]:
    root = lab.root / "cyrus"
    root.mkdir()
    with Cyrus(root, lab.certificate, lab.key, [f"cy{number}@test.example" for number in range(20)]).running() as server:
        yield server


@pytest.fixture
async def box(cyrus: Cyrus, tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(cyrus, tmp_path, f"cy{next(_numbers)}@test.example")
    yield box
    await box.close()


@pytest.mark.parametrize("deliver", ["replace", "folder"])
async def test_opened_with_flags_and_date(box: Box, deliver: str) -> None:
    """The original byte for byte; flags and INTERNALDATE kept; MOVE told by COPYUID; the same bytes again: quarantine."""
    original = note(to=box.user)
    sealed = box.seal(original)
    target = "INBOX" if deliver == "replace" else "Malote/Opened"
    box.client.put(sealed, flags="(\\Seen \\Flagged $Work)", date="05-Nov-2026 08:09:10 +0000")
    store = await box.open_store()
    await (await box.watcher(store, deliver=deliver)).run_once()
    [raw] = box.client.fetch(target)
    assert raw.endswith(original)
    [uid] = box.client.uids(target)
    flags, date = box.client.status_of(uid)
    assert flags == {"\\Seen", "\\Flagged", "$Work"}
    assert date == " 5-Nov-2026 08:09:10 +0000"
    assert box.client.fetch(SEALED) == [sealed]
    box.client.put(sealed)
    await (await box.watcher(store, deliver=deliver)).run_once()
    assert len(box.client.uids(target)) == 1
    assert len(box.client.uids(QUARANTINE)) == 1


REFUSED = {
    "8-bit header": "From: anna@sender.example\r\nSubject: Grüße\r\n\r\nx\r\n".encode(),
    "nul": b"From: anna@sender.example\r\nSubject: odd\r\n\r\na\0b\r\n",
    "bare cr": b"From: anna@sender.example\r\nSubject: odd\r\n\r\na\rb\r\n",
    "invalid header": b"From: anna@sender.example\r\nnot a field\r\n\r\nx\r\n",
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_what_cyrus_changes_or_refuses_is_attached(box: Box, kind: str) -> None:
    """8-bit header bytes would become X, NUL and invalid headers are refused: the original comes whole, as a file."""
    box.client.put(box.sender.seal_odd(REFUSED[kind], box.identity))
    await (await box.watcher(await box.open_store())).run_once()
    [message] = box.client.messages()
    assert verdict(message) in {"FRESH", "NOT-FOR-ME"}
    assert message.get_payload()[1].get_payload(decode=True) == REFUSED[kind]
    assert len(box.client.uids(SEALED)) == 1


async def test_bare_lf_arrives_with_crlf(box: Box) -> None:
    """Cyrus refuses bare LF: the copy has the line ends that IMAP asks for."""
    box.client.put(box.sender.seal_odd(b"From: anna@sender.example\nSubject: odd\n\nline\n", box.identity))
    await (await box.watcher(await box.open_store())).run_once()
    assert box.client.fetch()[0].endswith(b"Subject: odd\r\n\r\nline\r\n")


async def test_news_is_told_by_idle(box: Box) -> None:
    watcher = await box.watcher(await box.open_store(), poll_seconds=600)
    task = asyncio.create_task(watcher.run())
    for _ in wait_until(lambda: watcher.state == "watching"):
        await asyncio.sleep(0.05)
    box.client.put(box.seal())
    for _ in wait_until(lambda: verdicts(box.client.messages()) == ["FRESH"]):
        await asyncio.sleep(0.05)
    watcher.stop()
    await asyncio.wait_for(task, 20)


async def test_two_watchers_at_once(box: Box) -> None:
    """At rest every message is there once, opened."""
    late = [0]
    clock = lambda: now_ms() + late[0]      # noqa: E731
    watchers = [await box.watcher(await box.open_store(name), clock=clock) for name in ("a", "b")]
    for number in range(10):
        box.client.put(box.seal(note(f"number {number}", to=box.user)))
    for _ in range(4):
        await asyncio.gather(*(watcher.run_once() for watcher in watchers))
        late[0] += 31_000
    assert sorted(message["Subject"] for message in box.client.messages()) == [f"number {number}" for number in range(10)]
    assert verdicts(box.client.messages()) == ["FRESH"] * 10
    assert box.client.uids(QUARANTINE) == []


async def test_a_renumbered_folder(box: Box) -> None:
    """UIDVALIDITY changes: nothing is opened twice, what is new is opened."""
    store = await box.open_store()
    box.client.imap.create("Work")
    box.client.put(box.seal(), "Work")
    await (await box.watcher(store, folders=("Work",))).run_once()
    opened = box.client.fetch("Work")
    box.client.select()
    box.client.imap.delete("Work")
    await asyncio.sleep(1.1)    # UIDVALIDITY is the time in seconds
    box.client.imap.create("Work")
    box.client.put(opened[0], "Work")
    box.client.put(box.seal(), "Work")
    await (await box.watcher(store, folders=("Work",))).run_once()
    assert verdicts(box.client.messages("Work")) == ["FRESH", "FRESH"]
    assert box.client.uids(QUARANTINE) == []


async def test_sealed_originals_expire(box: Box) -> None:
    store = await box.open_store()
    box.client.put(box.seal(), date="01-Jan-2020 10:00:00 +0000")
    box.client.put(box.seal())
    await (await box.watcher(store, keep_sealed_days=30)).run_once()
    assert len(box.client.uids(SEALED)) == 1


async def test_what_malote_needs_is_offered(box: Box) -> None:
    async def password() -> str:
        return "secret"

    mailbox = await Mailbox.connect(box.config(), password=password)
    assert mailbox.has_move
    assert mailbox.has_uidplus
    assert mailbox.has_idle
    await mailbox.logout()


def test_check_finds_it_good(cyrus: Cyrus, lab: Lab, tmp_path: Path) -> None:
    """`malote check` over TLS: the login is taken, and all that malote needs is there."""
    home = Home(tmp_path / "home")
    user = f"cy{next(_numbers)}@test.example"
    home.configure("[outgoing]\nenabled = false\n" + account(user, cyrus.imaps_port, lab.certificate, home))
    home.keys("new", user)
    done = home.malote("check", "--json")
    findings = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [finding for finding in findings if finding["what"].startswith("account") and finding["state"] == "fault"] == []
    assert any("MOVE, UIDPLUS and IDLE" in finding["text"] for finding in findings), findings
