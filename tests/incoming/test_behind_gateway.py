"""A watcher on a mailbox behind a gateway, on a real Dovecot: what the gateway opened stays and is believed, once, and nobody
else is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from lab.gateway import House, Lmtp, codes, person
from lab.incoming import QUARANTINE, Box, note, verdicts
from lab.servers import Dovecot
from malote.core.gateway_word import GatewayKey, export_key
from malote.errors import KeyMissing
from malote.incoming.account import account_keys
from malote.incoming.watcher import Watcher, now_ms
from malote.store import Store
from malote.store.schema import Statement, seen

MASTER, DAY = b"m" * 32, 86_400_000


@dataclass
class Street:
    """A gateway, the mailbox behind it, and who watches that."""

    house: House
    box: Box
    store: Store

    async def send(self, raw: bytes) -> None:
        assert codes(await Lmtp(self.house.port).send(raw, self.box.user)) == [250]

    def past(self, raw: bytes) -> bytes:
        """As another server than the gateway would bring it: with trace of its own."""
        return b"Received: from elsewhere by mail.test.example; Tue, 24 Nov 2026 11:00:00 +0000\r\n" + raw

    async def watcher(self, *trusted: GatewayKey, own: bool = False, **settings: Any) -> Watcher:
        """`own`: the person has a key of her own on this device too."""
        watcher = await self.box.watcher(self.store, **settings)
        keys = account_keys([self.box.identity] if own else [], (self.box.user,))
        watcher._keys = lambda: replace(keys, trusted=trusted or (export_key(MASTER, self.box.user),))
        return watcher

    async def look(self, *trusted: GatewayKey, **settings: Any) -> None:
        await (await self.watcher(*trusted, **settings)).run_once()

    def inbox(self) -> list[bytes]:
        return self.box.client.fetch()

    def quarantined(self) -> list[bytes]:
        return self.box.client.fetch(QUARANTINE)


@pytest.fixture
async def street(dovecot: Dovecot, unused_users: Iterator[str], tmp_path: Path) -> AsyncIterator[Street]:
    box = Box(dovecot, tmp_path, next(unused_users))
    house = House(tmp_path / "gateway", dovecot.lmtp_port, identities={"@test.example": person("@test.example")})
    store = await box.open_store()
    async with house.running():
        await house.store.set_gateway_keys([MASTER])
        yield Street(house, box, store)
    await box.close()


def sealed(street: Street, subject: str = "hello") -> bytes:
    return street.house.sender.seal(note(subject, to=street.box.user), street.house.identities["@test.example"],
                                    address=street.box.user)


@pytest.mark.parametrize("own", [False, True])
async def test_what_the_gateway_opened_stays_and_says_whose_verdict_it_is(street: Street, own: bool) -> None:
    await street.look(own=own)
    await street.send(sealed(street))
    await street.send(note("plain", to=street.box.user))
    before = street.inbox()
    for _ in range(2):
        await street.look(own=own)
    assert street.inbox() == before
    assert not street.quarantined()
    [opened] = [message_from_bytes(raw) for raw in before if b"Malote-Verdict" in raw]
    assert verdicts([opened]) == ["FRESH"]
    assert f'text="{street.house.name} says: Verified' in " ".join(str(opened["Malote-Verdict"]).split())
    outcomes = [(entry.outcome, entry.verdict, entry.detail) for entry in await street.store.recent_outcomes(10)]
    assert outcomes == [("opened by gateway", "FRESH", street.house.name)]


async def test_nobody_else_is_believed(street: Street) -> None:
    """Another gateway's key, that of another person, a gateway that is not trusted at all, and content that was changed."""
    await street.look()
    await street.send(sealed(street))
    [raw] = street.inbox()
    street.box.client.put(street.past(raw.replace(b"Guten Tag", b"Guten Weg")))
    street.box.client.put(b"Subject: another\r\n" + raw)
    street.box.client.put(note(to=street.box.user, more="Malote-Gateway: gw.test.example; for=x; opened=1; mac=00\r\n"))
    street.box.client.put(note(to=street.box.user, more="Malote-Verdict: FRESH\r\n"))
    await street.look()
    assert street.inbox() == [raw]
    assert len(street.quarantined()) == 4


@pytest.mark.parametrize("key", [export_key(b"x" * 32, "@test.example"), export_key(MASTER, "somebody@test.example")])
async def test_by_another_key_nothing_is_believed(street: Street, key: GatewayKey) -> None:
    await street.send(sealed(street))
    await street.look(key)
    assert not street.inbox()
    assert len(street.quarantined()) == 1


async def test_a_repeat_that_comes_past_the_gateway_is_no_fresh_mail(street: Street) -> None:
    """Recorded in whatever way, and brought in by a server that does not go through the gateway. Also after the first was
    deleted; also byte for byte by a client of the mailbox, while the first is there."""
    await street.look()
    await street.send(sealed(street))
    await street.look()
    [raw] = street.inbox()
    street.box.client.put(street.past(raw))
    street.box.client.put(raw)
    await street.look()
    assert len(street.inbox()) == 1
    assert len(street.quarantined()) == 2
    street.box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
    street.box.client.select()
    street.box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
    street.box.client.imap.expunge()
    street.box.client.put(street.past(raw))
    await street.look()
    assert not street.inbox()
    assert [entry.verdict for entry in await street.store.recent_outcomes(10) if entry.outcome == "quarantined"] == [
        "DUPLICATE"] * 3


async def test_a_repeat_of_what_this_watcher_never_saw_is_no_fresh_mail(street: Street) -> None:
    """Opened and deleted before the watcher began, or longer ago than mail may be under way."""
    await street.send(sealed(street))
    [raw] = street.inbox()
    street.box.client.select()
    street.box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
    street.box.client.imap.expunge()
    late = now_ms() + 3_600_000
    await street.look(clock=lambda: late)
    # not the date of its opening (an earlier one: Dovecot takes none of the future)
    street.box.client.put(street.past(raw), date="20-Nov-2026 10:00:00 +0000")
    await street.look(clock=lambda: late)
    assert not street.inbox()
    assert len(street.quarantined()) == 1


async def test_what_was_delayed_behind_the_gateway_stays(street: Street) -> None:
    """Opened after the watcher began: whatever the date that the mail server gives it, it is the first copy there is."""
    await street.look()
    await street.send(sealed(street))
    [raw] = street.inbox()
    street.box.client.select()
    street.box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
    street.box.client.imap.expunge()
    street.box.client.put(street.past(raw), date="24-Nov-2026 08:00:00 +0000")
    await street.look()
    assert len(street.inbox()) == 1
    assert not street.quarantined()


async def test_a_repeat_that_the_gateway_found_is_no_mail_for_the_inbox(street: Street) -> None:
    """Where its quarantine is the person's own mailbox and nothing there files it."""
    street.house.passage._config = street.house.passage._config.model_copy(update={"quarantine": "{local}@{domain}"})
    await street.look()
    raw = sealed(street)
    for _ in range(2):
        await street.send(raw)
    assert sorted(verdicts([message_from_bytes(each) for each in street.inbox()])) == ["DUPLICATE", "FRESH"]
    for uid in street.box.client.uids(criteria='HEADER Malote-Verdict "FRESH"'):     # read and deleted before the watcher looks
        street.box.client.imap.uid("STORE", str(uid), "+FLAGS", "\\Deleted")
    street.box.client.imap.expunge()
    await street.look()
    assert not street.inbox()
    assert verdicts([message_from_bytes(each) for each in street.quarantined()]) == ["DUPLICATE"]
    assert [entry.verdict for entry in await street.store.recent_outcomes(10)] == ["DUPLICATE"]


async def test_mail_from_before_the_watcher_stays(street: Street) -> None:
    """It lies there with the date of its opening: nothing speaks against it, and an inbox is not emptied by a first look."""
    for number in range(3):
        await street.send(sealed(street, str(number)))
    await street.look(clock=lambda: now_ms() + 30 * DAY)
    assert len(street.inbox()) == 3
    assert not street.quarantined()


async def test_what_a_person_moves_and_a_server_renumbers_stays(street: Street) -> None:
    """The same bytes with another number are the same copy; also when the key is trusted no more."""
    await street.look()
    await street.send(sealed(street))
    await street.look()
    [raw] = street.inbox()
    street.box.client.imap.create("Elsewhere")
    for there, back in (("INBOX", "Elsewhere"), ("Elsewhere", "INBOX")):
        [uid] = street.box.client.uids(there)
        assert street.box.client.move(uid, back)
        await street.look()
    assert street.inbox() == [raw]
    street.box.client.move(street.box.client.uids()[0], "Elsewhere")
    street.box.client.move(street.box.client.uids("Elsewhere")[0], "INBOX")
    await street.look(export_key(b"new" * 10 + b"..", street.box.user))
    assert street.inbox() == [raw]


async def test_a_second_delivery_by_the_gateway_itself_is_a_repeat_where_the_first_came(street: Street) -> None:
    """The gateway cannot know whether its first try arrived (notes=AGAIN); who watches the mailbox can."""
    await street.look()
    raw = sealed(street)
    await street.send(raw)
    await street.house.store._writer.write(lambda db: db.run(Statement(update(seen).values(delivered=0)), {}))  # as after a kill
    street.house.turns.memory._known.clear()
    street.house.turns.at_most_ms = 0
    await street.send(raw)
    assert len(street.inbox()) == 2
    await street.look()
    assert len(street.inbox()) == 1
    assert len(street.quarantined()) == 1


async def test_a_new_key_is_taken_over_without_a_gap(street: Street) -> None:
    """rotate, new files for the watchers, retire: at each step what the gateway opens is believed."""
    new = b"n" * 32
    await street.look()
    steps = [((new, MASTER), [export_key(MASTER, street.box.user)]), ((new, MASTER), [export_key(new, street.box.user)]),
             ((new,), [export_key(new, street.box.user)])]
    for count, (masters, trusted) in enumerate(steps, 1):
        await street.house.store.set_gateway_keys(masters)
        street.house.passage._masters_until = 0
        await street.send(sealed(street, str(count)))
        await street.look(*trusted)
        assert len(street.inbox()) == count
    await street.send(sealed(street, "with the old key alone"))
    await street.look(export_key(MASTER, street.box.user))
    assert len(street.quarantined()) == 1


async def test_without_keys_and_without_a_trusted_gateway_nothing_is_watched(street: Street) -> None:
    watcher = await street.watcher()
    keys = account_keys([], (street.box.user,))
    watcher._keys = lambda: keys
    with pytest.raises(KeyMissing):
        await watcher.run_once()
