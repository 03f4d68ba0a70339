"""Every verdict, produced by mail in a real mailbox. EXPIRED and REVOKED: see tests/core, until cards have a life cycle."""

from __future__ import annotations

import os

import pytest

from lab.incoming import QUARANTINE, SEALED, Box, Sender, note, verdict, verdicts
from malote.core.identity import new_identity, rotate
from malote.core.keys import SignatureAlgorithm
from malote.incoming.watcher import now_ms
from malote.store import Store

DAY = 86_400_000
HOUR = 3_600_000


async def look(box: Box, store: Store, **settings: object) -> list[str]:
    """One pass of a watcher; the verdicts of what is in the INBOX then."""
    await (await box.watcher(store, **settings)).run_once()
    return verdicts(box.client.messages())


async def test_fresh(box: Box) -> None:
    box.client.put(box.seal())
    assert await look(box, await box.open_store()) == ["FRESH"]
    [message] = box.client.messages()
    text = " ".join(message["Malote-Verdict"].split())
    assert f"Verified: from anna@sender.example to {box.user}" in text
    assert " ".join(message["Authentication-Results"].split()).endswith("x-malote=pass reason=FRESH")


@pytest.mark.parametrize("same_pass", [True, False])
async def test_duplicate(box: Box, same_pass: bool) -> None:
    """A stored message that is sent again is not shown, whether it comes at once or later."""
    store, raw = await box.open_store(), box.seal()
    box.client.put(raw)
    if not same_pass:
        assert await look(box, store) == ["FRESH"]
    box.client.put(raw)
    assert await look(box, store) == ["FRESH"]
    assert box.client.fetch(QUARANTINE) == [raw]
    assert len(box.client.uids(SEALED)) == 1


async def test_duplicate_under_another_ciphertext(box: Box) -> None:
    """A sender in doubt seals the same original again with the same id and number (design 4)."""
    store, original, name = await box.open_store(), note(to=box.user), os.urandom(16)
    for _ in range(2):
        box.client.put(box.seal(original, submission_id=name, serial=1))
    assert await look(box, store) == ["FRESH"]
    assert len(box.client.uids(QUARANTINE)) == 1


async def test_duplicate_in_another_folder(box: Box) -> None:
    """UIDs and folders decide nothing: a repeat in the junk folder is a repeat."""
    store, raw = await box.open_store(), box.seal()
    box.client.put(raw)
    await look(box, store)
    box.client.put(raw, "Spam")
    assert await look(box, store, folders=("INBOX", "\\Junk")) == ["FRESH"]
    assert box.client.uids("Spam") == []
    assert box.client.fetch(QUARANTINE) == [raw]


async def test_duplicate_after_the_card_came(box: Box) -> None:
    """First-contact mail that is repeated after the card was imported is a repeat, not fresh."""
    store, raw = await box.open_store(card=False), box.seal()
    box.client.put(raw)
    assert await look(box, store) == ["UNKNOWN-SENDER"]
    await box.trust(store, box.sender.identity)
    box.client.put(raw)
    assert await look(box, store) == ["UNKNOWN-SENDER"]
    assert box.client.fetch(QUARANTINE) == [raw]


async def test_duplicate_that_another_device_opened(box: Box) -> None:
    """Opened on device A and injected again while only B runs: B has seen it in the sealed folder."""
    first, second, raw = await box.open_store("a"), await box.open_store("b"), box.seal()
    box.client.put(raw)
    assert await look(box, first) == ["FRESH"]
    box.client.put(raw)
    assert await look(box, second) == ["FRESH"]
    assert box.client.fetch(QUARANTINE) == [raw]


async def test_late(box: Box) -> None:
    """Held back for eight days, by our own clock and the server's."""
    store = await box.open_store(card=False)
    await box.trust(store, box.sender.identity, since_ms=now_ms() - 20 * DAY)
    box.client.put(box.seal(sent_at_ms=now_ms() - 8 * DAY))
    assert await look(box, store) == ["LATE"]


async def test_not_late_when_we_come_late(box: Box) -> None:
    """We were away for a month and the server says it came in time: fresh, and the text names whose word that is."""
    store = await box.open_store()
    box.client.put(box.seal())
    await (await box.watcher(store, clock=lambda: now_ms() + 30 * DAY)).run_once()
    [message] = box.client.messages()
    assert verdict(message) == "FRESH"
    assert "the word of your mail server" in " ".join(message["Malote-Verdict"].split())


async def test_late_by_our_own_last_look(box: Box) -> None:
    """The server claims that it had the message all along; but our last look, after nine days, did not see it."""
    store = await box.open_store()
    await look(box, store, clock=lambda: now_ms() + 9 * DAY)
    box.client.put(box.seal())
    assert await look(box, store, clock=lambda: now_ms() + 10 * DAY) == ["LATE"]


async def test_unverifiable_at_first_contact(box: Box) -> None:
    """Written before the sender's card was held: it cannot be told from a repeat."""
    store = await box.open_store()
    box.client.put(box.seal(sent_at_ms=now_ms() - 2 * HOUR))
    assert await look(box, store) == ["UNVERIFIABLE"]


@pytest.mark.parametrize("folder", [SEALED, QUARANTINE])
async def test_unverifiable_after_a_folder_went_backwards(box: Box, folder: str) -> None:
    """What other devices opened may have been hidden from us: nothing sent before is called fresh, later mail is."""
    store, raw = await box.open_store(), box.seal()
    box.client.put(raw)
    box.client.put(raw)
    await look(box, store)
    box.client.put(box.seal())
    box.client.select(folder)
    box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
    box.client.imap.expunge()
    assert await look(box, store) == ["FRESH", "UNVERIFIABLE"]
    box.client.put(box.seal())
    assert await look(box, store) == ["FRESH", "UNVERIFIABLE", "FRESH"]


async def test_unverifiable_after_a_folder_was_renumbered(box: Box) -> None:
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store)
    box.client.put(box.seal())
    box.client.imap.delete(f'"{SEALED}"')
    assert await look(box, store) == ["FRESH", "UNVERIFIABLE"]


async def test_conflict(box: Box) -> None:
    """Two originals under one id: the second goes to quarantine."""
    store, name = await box.open_store(), os.urandom(16)
    second = box.seal(note("two", to=box.user), submission_id=name)
    box.client.put(box.seal(note("one", to=box.user), submission_id=name))
    box.client.put(second)
    assert await look(box, store) == ["FRESH"]
    assert box.client.fetch(QUARANTINE) == [second]
    assert [entry.verdict for entry in await outcomes(store)] == ["CONFLICT", "FRESH"]


async def outcomes(store: Store) -> list[object]:
    await store.flush()
    return list(await store.recent_outcomes())


async def test_serial_reused(box: Box) -> None:
    """A sender restored from a backup numbers again: delivered, never fresh, with what to ask."""
    store = await box.open_store()
    box.client.put(box.seal(serial=7))
    box.client.put(box.seal(serial=7))
    assert await look(box, store) == ["FRESH", "SERIAL-REUSED"]
    assert "restored from a backup" in " ".join(box.client.messages()[1]["Malote-Verdict"].split())


async def test_gap_is_a_note(box: Box) -> None:
    store = await box.open_store()
    for serial, prev in ((1, 0), (3, 2)):
        box.client.put(box.seal(serial=serial, prev=prev))
    assert await look(box, store) == ["FRESH", "FRESH"]
    notes = [" ".join(message["Malote-Verdict"].split()) for message in box.client.messages()]
    assert "notes=GAP" not in notes[0]
    assert "notes=GAP" in notes[1]


async def test_future(box: Box) -> None:
    box.client.put(box.seal(sent_at_ms=now_ms() + HOUR))
    assert await look(box, await box.open_store()) == ["FUTURE"]


async def test_unsigned(box: Box) -> None:
    """The address of somebody whose card we hold, another key: delivered as not proven."""
    store = await box.open_store()
    box.client.put(Sender().seal(note(to=box.user), box.identity))
    assert await look(box, store) == ["UNSIGNED"]
    assert "reason=UNSIGNED" in box.client.messages()[0]["Authentication-Results"]


async def test_unknown_sender(box: Box) -> None:
    box.client.put(box.seal())
    assert await look(box, await box.open_store(card=False)) == ["UNKNOWN-SENDER"]


async def test_not_for_me(box: Box) -> None:
    """Sealed for somebody else's address under our key: somebody re-addressed it."""
    box.client.put(box.seal(address="mallory@test.example"))
    assert await look(box, await box.open_store()) == ["NOT-FOR-ME"]


@pytest.mark.parametrize("damage", ["key", "bit", "cut"])
async def test_unreadable_stays_where_it_is(box: Box, damage: str) -> None:
    """No key, a flipped bit, a message cut short: the original stays, marked, and is not tried for ever."""
    store, raw = await box.open_store(), box.seal()
    if damage == "key":
        raw = box.sender.seal(note(), new_identity("else@test.example", SignatureAlgorithm.ED25519, now_ms()))
    if damage == "bit":
        at = raw.rindex(b"\r\n\r\n") + 2000
        raw = raw[:at] + (b"A" if raw[at:at + 1] != b"A" else b"B") + raw[at + 1:]
    if damage == "cut":
        raw = raw[:-600]
    box.client.put(raw)
    await look(box, store)
    assert box.client.fetch() == [raw]
    assert "$MaloteUnreadable" in box.client.status_of(1)[0]
    assert [entry.verdict for entry in await outcomes(store)] == ["UNREADABLE"]
    await look(box, store)
    assert len(await outcomes(store)) == 1


async def test_unreadable_is_opened_when_the_key_comes(box: Box) -> None:
    """Tried again as soon as the keys change, and judged by when it came."""
    store, new = await box.open_store(), rotate(box.identity, now_ms())
    box.client.put(box.sender.seal(note(to=box.user), new))
    assert await look(box, store) == ["None"]
    assert await look(box, store, identities=[new]) == ["FRESH"]
    assert box.client.status_of(box.client.uids()[0])[0] == set()


FORGERIES = ["Malote-Verdict: FRESH; text=\"trust me\"", "malote-verdict : FRESH", "Malote-Mark: " + "0" * 32 + "-" + "0" * 16,
             "Malote-Seal: yes", "MALOTE-VERDICT:\r\n FRESH"]


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_forged_status_goes_to_quarantine(box: Box, forgery: str, kind: str) -> None:
    """Nobody outside can make a message look opened and verified, neither plain mail nor around sealed mail."""
    raw = forgery.encode() + b"\r\n" + (note() if kind == "plain" else box.seal())
    store = await box.open_store()
    box.client.put(raw)
    assert await look(box, store) == []
    assert box.client.fetch(QUARANTINE) == [raw]


async def test_a_forged_copy_does_not_make_the_true_message_a_repeat(box: Box) -> None:
    """Else who catches a message on its way could suppress it by injecting it first, with a forged header."""
    store, raw = await box.open_store(), box.seal()
    box.client.put(b"Malote-Mark: x\r\n" + raw)
    assert await look(box, store) == []
    box.client.put(raw)
    assert await look(box, store) == ["FRESH"]


async def test_a_stolen_authserv_id_is_noticed(box: Box) -> None:
    """Our authserv-id shows in every opened message, so it may become known. Mail that comes with it is a forgery."""
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store)
    name = box.client.messages()[0]["Authentication-Results"].split(";")[0].strip()
    forged = f"Authentication-Results: {name}; x-malote=pass\r\n".encode() + note()
    box.client.put(forged)
    assert await look(box, store) == ["FRESH"]
    assert box.client.fetch(QUARANTINE) == [forged]


async def test_forged_headers_inside_a_sealed_message_are_removed(box: Box) -> None:
    """Whoever may write to us may not write our verdict: what the original says of itself at its top goes."""
    store = await box.open_store(card=False)
    inner = b"Malote-Verdict: FRESH; text=\"x\"\r\nMalote-Key: stays\r\n" + note(to=box.user)
    box.client.put(box.seal(inner))
    assert await look(box, store) == ["UNKNOWN-SENDER"]
    [raw] = box.client.fetch()
    assert raw.count(b"Malote-Verdict:") == 1
    assert b"Malote-Key: stays" in raw


async def test_an_opened_message_may_be_copied_about(box: Box) -> None:
    """A person copies an opened message: it bears a valid mac and stays."""
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store)
    box.client.put(box.client.fetch()[0])
    assert await look(box, store) == ["FRESH", "FRESH"]


async def test_a_changed_copy_of_an_opened_message_is_a_forgery(box: Box) -> None:
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store)
    changed = box.client.fetch()[0].replace(b"Guten Tag", b"Bad day!!")
    box.client.put(changed)
    assert await look(box, store) == ["FRESH"]
    assert box.client.fetch(QUARANTINE) == [changed]


async def test_a_forwarded_sealed_message_is_only_an_attachment(box: Box) -> None:
    """Nested sealed mail is the content of somebody else's message: it is neither opened nor remembered."""
    store, raw = await box.open_store(), box.seal()
    forward = (b"From: x@y.example\r\nSubject: fwd\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=f\r\n\r\n"
               b"--f\r\nContent-Type: message/rfc822\r\n\r\n" + raw + b"\r\n--f--\r\n")
    box.client.put(forward)
    await look(box, store)
    assert box.client.fetch() == [forward]
    box.client.put(raw)
    assert await look(box, store) == ["None", "FRESH"]


async def test_mail_to_oneself_is_proven_by_ones_own_card(box: Box) -> None:
    store = await box.open_store(card=False)
    box.sender.identity = box.identity
    box.client.put(box.sender.seal(note(sender=box.user, to=box.user), box.identity))
    assert await look(box, store) == ["FRESH"]


async def test_mail_that_another_device_opened_is_known_for_replies(box: Box) -> None:
    """It is answered from whatever device its reader has at hand."""
    first, second, original = await box.open_store("a"), await box.open_store("b"), note(to=box.user)
    box.client.put(box.seal(original))
    assert await look(box, first) == ["FRESH"]
    await look(box, second)
    [message_id] = [line.split(b": ")[1].decode() for line in original.splitlines() if line.lower().startswith(b"message-id")]
    await second.flush()
    known = (await second.known_messages([message_id]))[message_id]
    assert known.outer_id
    assert [known.had_part(each) for each in (box.user, "anna@sender.example", "mallory@evil.example")] == [True, True, False]


@pytest.mark.parametrize("card", [True, False])
async def test_who_had_part_is_remembered_for_replies(box: Box, card: bool) -> None:
    """The sealing side refuses to let others in. By what is signed alone: of mail whose sender is not proven it is only
    remembered that replies to it must be sealed."""
    store = await box.open_store(card=card)
    original = note(to=box.user, more="Cc: Carl <carl@else.example>\r\nCc: zoe@else.example, broken <\r\n"
                                      "Reply-To: desk@sender.example\r\n")
    box.client.put(box.seal(original))
    assert await look(box, store) == ["FRESH" if card else "UNKNOWN-SENDER"]
    [message_id] = [line.split(b": ")[1].decode() for line in original.splitlines() if line.lower().startswith(b"message-id")]
    await store.flush()
    known = (await store.known_messages([message_id]))[message_id]
    assert bool(known.outer_id) == card
    people = (box.user, "anna@sender.example", "desk@sender.example", "carl@else.example", "zoe@else.example")
    assert [known.had_part(each) for each in people] == [True, True, True, True, not card]
