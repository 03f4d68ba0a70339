"""`malote check` says how full a mailbox is, and warns before opened mail no longer fits beside the sealed (RFC 9208)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.imap_peers import CAPABILITIES, Script, account, scripted, secret
from lab.incoming import Box, limited, note
from lab.servers import PASSWORD, Dovecot, Lab
from malote.cli.findings import Finding, State
from malote.cli.server_probes import _room, account_probe
from malote.incoming.mailbox import Mailbox

USERS = [f"{uuid.uuid4().hex}@test.example" for _ in range(8)]


@pytest.fixture(scope="module")
def small(lab: Lab) -> Dovecot:
    return lab.dovecot(USERS, extra=limited("storage=1000k"))


@pytest.fixture(scope="module")
def unused() -> Iterator[str]:
    return iter(USERS)


async def room(box: Box, **settings: Any) -> Finding:
    password = box.directory / "password"
    password.touch(0o600)
    password.write_text(PASSWORD)
    found = [finding async for finding in account_probe(box.config(password_file=password, **settings), {})]
    assert not [finding for finding in found if finding.state is State.FAULT]
    [finding] = [finding for finding in found if finding.what == "account box: room"]
    return finding


def filler(size: int) -> bytes:
    return note("filler", body=("x" * 70 + "\r\n") * (size // 72))


@pytest.mark.parametrize(("plain", "sealed", "deliver", "state", "text"), [
    (100_000, 0, "replace", State.OK, "9 % full, 0.1 MB of 1.0 MB"),
    (100_000, 300_000, "replace", State.OK, "39 % full"),
    (400_000, 300_000, "replace", State.OK, "68 % full"),
    (400_000, 400_000, "replace", State.WARNING, "too little to open the 1 sealed messages"),
    (400_000, 400_000, "folder", State.WARNING, "too little to open the 1 sealed messages"),
    (400_000, 400_000, "maildir", State.OK, "opened mail needs none there"),
    (950_000, 0, "replace", State.WARNING, "each mail needs room twice"),
])
async def test_how_full_it_is(small: Dovecot, unused: Iterator[str], tmp_path: Path, plain: int, sealed: int, deliver: str,
                              state: State, text: str) -> None:
    """By size: a warning when what waits would not fit, or soon nothing will; none where nothing is stored twice. What was
    opened already needs no more room."""
    box = Box(small, tmp_path, next(unused))
    box.client.put(b"Malote-Verdict: FRESH\r\n" + filler(plain))
    if sealed:
        box.client.put(b"Malote: 1\r\n" + filler(sealed))
    finding = await room(box, deliver=deliver, maildir=tmp_path / "mail")
    assert (finding.state, text in finding.text) == (state, True), finding.text
    assert bool(finding.cure) == (state is not State.OK)
    await box.close()


@pytest.mark.parametrize(("messages", "state"), [(4, State.WARNING), (5, State.OK)])
async def test_a_limit_of_messages(lab: Lab, tmp_path: Path, messages: int, state: State) -> None:
    """Real sealed mail; the watcher comes to the same conclusion."""
    box = Box(lab.dovecot(USERS[:1], extra=limited(f"messages={messages}")), tmp_path, USERS[0])
    for raw in (note(), note(), note(), box.seal()):
        box.client.put(raw)
    finding = await room(box)
    assert (finding.state, f"4 of {messages} messages" in finding.text) == (state, True), finding.text
    store = await box.open_store()
    await (await box.watcher(store)).run_once()
    assert len(box.client.uids("INBOX", "HEADER Malote-Verdict FRESH")) == (state is State.OK)
    await box.close()


async def test_a_server_that_knows_of_no_limit(dovecot: Dovecot, tmp_path: Path) -> None:
    """No QUOTA among its capabilities: that is said, and nothing asked."""
    box = Box(dovecot, tmp_path, "alice@test.example")
    assert await room(box) == Finding("account box: room", State.OK, "its server tells of no limit")
    await box.close()


@pytest.mark.parametrize(("answers", "state", "text"), [
    ([b'* QUOTAROOT INBOX "" second', b'* QUOTA "" (STORAGE 10 512)', b"* QUOTA second (mailbox 9 9 message 7 20)"],
     State.OK, "1 % full, 0.0 MB of 0.5 MB, 35 % full, 7 of 20 messages"),
    ([b'* QUOTAROOT INBOX ""', b'* QUOTA "" ()'], State.OK, "its server tells of no limit"),
    ([b"* QUOTA {6}\r\na root (STORAGE 0 0)"], State.WARNING, "no room at all"),
    ([b'* QUOTA "" (STORAGE 10)'], State.WARNING, "does not say how much there is (QUOTA)"),
    ([b'* QUOTA "" (STORAGE few many)'], State.WARNING, "does not say how much there is (QUOTA)"),
    ([], State.WARNING, "does not say how much there is (NOPERM)"),
])
async def test_answers_of_other_servers(tmp_path: Path, answers: list[bytes], state: State, text: str) -> None:
    """Several roots, resources that we know nothing of, answers that are none, a refusal: the rest is looked at all the same."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"GETQUOTAROOT", f"{CAPABILITIES} QUOTA=RES-STORAGE")
        await script.send(*answers, tag + (b" OK done" if answers else b" NO [NOPERM] not for you"))
        await script.until(b"SELECT")

    async with scripted(play) as port:
        box = await Mailbox.connect(account(port), password=secret)
        finding = await _room("account box", account(port), box, [])
        await box.noop()
        box.abort()
    assert (finding.state, text in finding.text) == (state, True), finding.text
