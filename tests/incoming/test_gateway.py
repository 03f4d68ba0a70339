"""The opening listener in front of a real Dovecot (LMTP): what arrives for whom, with which verdict, exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from email import message_from_bytes
from pathlib import Path

import pytest

from lab.gateway import House, Lmtp, ScriptedLmtp, codes, person, sealed_for
from lab.incoming import note, verdict, verdicts
from lab.servers import Dovecot, free_port
from malote.core import status
from malote.core.identity import Identity
from malote.incoming.account import AccountKeys
from malote.incoming.gateway_keys import recipient_keys
from malote.incoming.watcher import now_ms

QUARANTINE = "quarantine@test.example"


@pytest.fixture(scope="session")
def mailboxes(dovecot: Dovecot, unused_users: Iterator[str]) -> Iterator[str]:
    dovecot.add_user(QUARANTINE)
    return unused_users


@pytest.fixture
def people(mailboxes: Iterator[str]) -> list[str]:
    return [next(mailboxes), next(mailboxes)]


def keys_of(people: list[str]) -> dict[str, Identity]:
    return {name: person(name) for name in people}


@pytest.fixture
async def house(dovecot: Dovecot, people: list[str], tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path / "store", dovecot.lmtp_port, identities=keys_of(people)).running() as house:
        yield house


def inbox(dovecot: Dovecot, user: str) -> list[bytes]:
    return [raw.replace(b"\r\n", b"\n") for raw in dovecot.messages(user)]


def quarantined(dovecot: Dovecot, user: str) -> list[bytes]:
    return [raw for raw in dovecot.messages(QUARANTINE) if f"for {user}".encode() in raw.replace(b"\r\n ", b" ")]


async def test_sealed_mail_arrives_opened_with_its_verdict(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """The original byte for byte below our headers, and the trace of the sealed one on top."""
    original = note(to=people[0])
    answers = await Lmtp(house.port).send(house.sender.seal(original, house.identities[people[0]]), people[0])
    assert codes(answers) == [250]
    [raw] = inbox(dovecot, people[0])
    message = message_from_bytes(raw)
    assert verdict(message) == "FRESH"
    assert raw.endswith(original.replace(b"\r\n", b"\n"))
    received = message.get_all("Received", [])
    assert any("(malote) with LMTP" in " ".join(line.split()) for line in received)
    assert any("mx.sender.example" in line for line in received)
    assert message["Malote-Mark"]


async def test_plain_mail_passes_byte_for_byte(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """One Received line on top is all: without it a loop could not be seen. Everybody shares one transaction."""
    plain = note(to=", ".join(people), body="Guten Tag\r\n.\r\n..dots\r\n", more="Malote: 1\r\nMalote-Key: abc\r\n")
    assert codes(await Lmtp(house.port).send(plain, *people)) == [250, 250]
    for user in people:
        [raw] = inbox(dovecot, user)
        _, _, rest = raw.partition(b"(malote) with LMTP;\n")
        assert rest.partition(b"\n")[2] == plain.replace(b"\r\n", b"\n")
        assert b"Malote-Verdict" not in raw


async def test_the_same_mail_twice_is_a_duplicate_in_quarantine(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """A repeat is never shown as fresh, nor lost: it lies sealed in quarantine, with the verdict."""
    raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
    for _ in range(2):
        assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    assert verdicts([message_from_bytes(each) for each in inbox(dovecot, people[0])]) == ["FRESH"]
    [kept] = quarantined(dovecot, people[0])
    assert verdict(message_from_bytes(kept)) == "DUPLICATE"
    assert b"Guten Tag" not in kept
    assert b"Return-Path: <>" in kept           # nothing that becomes of it there is told to the sender


async def test_the_same_mail_twice_at_the_same_moment_is_fresh_once(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """Nine at once: the judgement of the first says "not delivered" until the next server has it, and all others must wait."""
    raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
    answers = await asyncio.gather(*(Lmtp(house.port).send(raw, people[0]) for _ in range(9)))
    assert [codes(each) for each in answers] == [[250]] * 9
    assert verdicts([message_from_bytes(each) for each in inbox(dovecot, people[0])]) == ["FRESH"]
    assert len(quarantined(dovecot, people[0])) == 8


async def test_duplicates_may_be_refused_instead(dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    house = House(tmp_path / "store", dovecot.lmtp_port, quarantine="refuse", identities=keys_of(people[:1]))
    async with house.running():
        raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
        assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
        [answer] = await Lmtp(house.port).send(raw, people[0])
        assert answer.startswith("550 5.7.1 Second copy")
        forged = note(to=people[0], more="Malote-Verdict: FRESH\r\n")
        assert codes(await Lmtp(house.port).send(forged, people[0])) == [550]
    assert len(inbox(dovecot, people[0])) == 1


async def test_quarantine_in_a_folder_of_each_person(dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    """As documented for servers that file by the detail of the address."""
    house = House(tmp_path / "store", dovecot.lmtp_port, quarantine="{local}+quarantine@{domain}",
                  identities=keys_of(people[:1]))
    async with house.running():
        raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
        for _ in range(2):
            assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    assert sorted(verdicts([message_from_bytes(each) for each in inbox(dovecot, people[0])])) == ["DUPLICATE", "FRESH"]


async def test_a_quarantine_that_takes_nothing_keeps_the_mail_at_the_client(dovecot: Dovecot, people: list[str],
                                                                          tmp_path: Path) -> None:
    """A wrong address in the configuration is no reason to bounce or to lose anything."""
    house = House(tmp_path / "store", dovecot.lmtp_port, quarantine="nobody@test.example", identities=keys_of(people[:1]))
    async with house.running():
        forged = note(to=people[0], more="Malote-Verdict: FRESH\r\n")
        assert codes(await Lmtp(house.port).send(forged, people[0])) == [451]
    assert not inbox(dovecot, people[0])


@pytest.mark.parametrize("field", ["Malote-Verdict: FRESH", "Malote-Mark: x", "Malote-Seal: no",
                                   "Authentication-Results: {authserv}; x-malote=pass reason=FRESH"])
async def test_headers_of_ours_from_outside_are_never_believed(
        house: House, dovecot: Dovecot, people: list[str], field: str) -> None:
    """The message goes to quarantine, as the watcher does with it, and there without the header."""
    keys = house_keys(house, people[0])
    forged = note(to=people[0], more=field.format(authserv=keys.authserv_id) + "\r\n")
    assert codes(await Lmtp(house.port).send(forged, people[0])) == [250]
    assert not inbox(dovecot, people[0])
    [kept] = quarantined(dovecot, people[0])
    assert b"Malote-Quarantine: FORGED" in kept
    assert not status.carries_status(kept, keys.authserv_id)


def house_keys(house: House, address: str) -> AccountKeys:
    keys = recipient_keys(house.identities, address)
    assert keys is not None
    return keys


async def test_what_cannot_be_opened_is_passed_on_as_it_is(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """Sealed for a key that only the person has, or damaged: never bounced, never changed."""
    other = house.sender.seal(note(to=people[0]), person(people[0]))        # the same address, another key
    damaged = house.sender.seal(note(to=people[0]), house.identities[people[0]])
    middle = len(damaged) - 400
    damaged = damaged[:middle] + bytes([damaged[middle] ^ 1]) + damaged[middle + 1:]
    for raw in (other, damaged):
        assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    arrived = inbox(dovecot, people[0])
    for sent in (other, damaged):
        assert [raw.endswith(sent.replace(b"\r\n", b"\n")) for raw in arrived].count(True) == 1
    assert not any(b"Malote-Verdict" in raw for raw in arrived)


@pytest.mark.parametrize("step", ["find_parts", "unseal"])
async def test_a_message_that_sets_off_a_fault_is_passed_on_too(
        house: House, dovecot: Dovecot, people: list[str], step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a hostile message finds in the code that takes it apart: it must not wait for ever, nor bounce."""
    def broken(*_: object) -> None:
        raise RecursionError("the secret text")
    monkeypatch.setattr(f"malote.incoming.passage.{step}", broken)
    raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
    assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    [arrived] = inbox(dovecot, people[0])
    assert arrived.endswith(raw.replace(b"\r\n", b"\n"))


async def test_one_message_to_two_in_two_transactions_of_the_client_is_fresh_for_each(
        house: House, dovecot: Dovecot, people: list[str]) -> None:
    """The recipient is part of what is remembered: the same bytes for two people are two messages."""
    raw = sealed_for(house, people, note(to=", ".join(people)))
    for user in people:
        assert codes(await Lmtp(house.port).send(raw, user)) == [250]
    for user in people:
        assert verdicts([message_from_bytes(each) for each in inbox(dovecot, user)]) == ["FRESH"]
    assert not quarantined(dovecot, people[0]) + quarantined(dovecot, people[1])


async def test_one_message_to_two_opened_and_one_not_in_one_transaction(house: House, dovecot: Dovecot, people: list[str],
                                                                        mailboxes: Iterator[str]) -> None:
    """Each body once: his own opened copy for each who has a key here, the message as it came for the third."""
    third = next(mailboxes)
    raw = sealed_for(house, people, note(to=", ".join(people)))
    assert codes(await Lmtp(house.port).send(raw, people[0], third, people[1], people[0])) == [250] * 4
    for user in people:
        [message] = [message_from_bytes(each) for each in inbox(dovecot, user)]
        assert verdict(message) == "FRESH"
        assert user in " ".join(str(message["Malote-Verdict"]).split())
    [untouched] = inbox(dovecot, third)
    assert untouched.endswith(raw.replace(b"\r\n", b"\n"))


async def test_unknown_users_are_refused_at_rcpt_by_the_next_server(house: House, people: list[str]) -> None:
    answers = await Lmtp(house.port).send(note(to=people[0]), "nobody@test.example", people[0])
    assert codes(answers) == [550, 250]


async def test_an_original_that_smtp_cannot_carry_arrives_as_an_attachment(
        house: House, dovecot: Dovecot, people: list[str]) -> None:
    odd = note(to=people[0], body="nul\0 and bare\rcr\r\n")
    bare = note(to=people[0]).replace(b"\r\n", b"\n")
    identity = house.identities[people[0]]
    for original in (odd, bare):
        raw = house.sender.seal(original, identity, frame=note(to=people[0]))
        assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    second, first = sorted(inbox(dovecot, people[0]), key=lambda raw: b"multipart" in raw)
    parts = message_from_bytes(first).get_payload()
    assert isinstance(parts, list)
    assert parts[1].get_payload(decode=True) == odd     # type: ignore[union-attr]
    assert second.endswith(bare)


async def test_large_mail_is_opened_in_a_thread_and_arrives_whole(house: House, dovecot: Dovecot, people: list[str]) -> None:
    original = note(to=people[0], body="".join(f"line {number} of many\r\n" for number in range(60_000)))
    raw = sealed_for(house, people, original)
    assert codes(await Lmtp(house.port).send(raw, *people, mail=f"SIZE={len(raw)}")) == [250, 250]
    for user in people:
        [arrived] = inbox(dovecot, user)
        assert verdict(message_from_bytes(arrived)) == "FRESH"
        assert arrived.endswith(original.replace(b"\r\n", b"\n"))


# --- the gateway of a domain


async def test_the_key_of_a_domain_opens_for_its_people_and_says_so(dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    """FRESH for whom it names, NOT-FOR-ME for a colleague to whom somebody else brought it."""
    gateway = person("@test.example")
    async with House(tmp_path / "store", dovecot.lmtp_port, identities={"@test.example": gateway}).running() as house:
        raw = sealed_for(house, people[:1], note(to=people[0]))
        assert codes(await Lmtp(house.port).send(raw, *people)) == [250, 250]
    [first] = [message_from_bytes(each) for each in inbox(dovecot, people[0])]
    [second] = [message_from_bytes(each) for each in inbox(dovecot, people[1])]
    assert verdicts([first, second]) == ["FRESH", "NOT-FOR-ME"]
    said = " ".join(str(first["Malote-Verdict"]).split())
    assert "notes=TO-GATEWAY" in said
    assert "gateway of test.example opened it" in said


async def test_two_people_of_a_domain_have_numbers_of_their_own(dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    """A second message to one of them makes no gap for the other, and none for him."""
    gateway = person("@test.example")
    async with House(tmp_path / "store", dovecot.lmtp_port, identities={"@test.example": gateway}).running() as house:
        for serial in (1, 2):
            raw = sealed_for(house, people, note(to=", ".join(people)), serial=serial)
            assert codes(await Lmtp(house.port).send(raw, *people)) == [250, 250]
    for user in people:
        messages = [message_from_bytes(each) for each in inbox(dovecot, user)]
        assert verdicts(messages) == ["FRESH", "FRESH"]
        assert not any("GAP" in str(message["Malote-Verdict"]) for message in messages)


async def test_mail_that_a_gateway_sealed_says_so(dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    theirs, mine = person("@sender.example"), person(people[0])
    async with House(tmp_path / "store", dovecot.lmtp_port, identities={people[0]: mine}).running(card=False) as house:
        await house.trust(theirs)
        house.sender.identity = theirs
        raw = sealed_for(house, [mine.address], note(to=people[0]))
        assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    [message] = [message_from_bytes(each) for each in inbox(dovecot, people[0])]
    said = " ".join(str(message["Malote-Verdict"]).split())
    assert verdict(message) == "FRESH"
    assert "notes=FROM-GATEWAY" in said
    assert "gateway of sender.example sealed it" in said


async def test_a_persons_own_card_beats_the_gateways(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """Whoever has a card of his own is not spoken for by the gateway of his domain: that signature proves nothing."""
    theirs = person("@sender.example")
    await house.trust(theirs)
    house.sender.identity, genuine = theirs, house.sender.identity
    assert genuine.address == "anna@sender.example"
    raw = sealed_for(house, [people[0]], note(to=people[0]))
    assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    assert verdicts([message_from_bytes(each) for each in inbox(dovecot, people[0])]) == ["UNSIGNED"]


# --- failures of the next server


async def test_452_for_one_of_two_then_a_retry_gives_each_one_fresh_copy(people: list[str], tmp_path: Path) -> None:
    """LMTP: the client comes again for the one that failed, with the same bytes."""
    full = {people[1]}
    async with ScriptedLmtp(after_data=lambda user: "452 4.2.2 full" if user in full else None) as peer:
        house = House(tmp_path / "store", peer.port, identities=keys_of(people))
        async with house.running():
            raw = sealed_for(house, people, note(to=", ".join(people)))
            assert codes(await Lmtp(house.port).send(raw, *people)) == [250, 452]
            full.clear()
            assert codes(await Lmtp(house.port).send(raw, people[1])) == [250]
    assert {user: verdicts([message_from_bytes(raw) for raw in peer.messages[user]]) for user in people} == {
        people[0]: ["FRESH"], people[1]: ["FRESH"]}
    assert "AGAIN" not in str(message_from_bytes(peer.messages[people[1]][0])["Malote-Verdict"])


async def test_over_smtp_a_retry_of_all_serves_nobody_twice(people: list[str], tmp_path: Path) -> None:
    """SMTP has one answer for all recipients: 451, and who had the message then is told 250 without getting it again."""
    full = {people[1]}
    async with ScriptedLmtp(after_data=lambda user: "452 4.2.2 full" if user in full else None) as peer:
        house = House(tmp_path / "store", peer.port, protocol="smtp", identities=keys_of(people))
        async with house.running():
            for raw in (sealed_for(house, people, note(to=", ".join(people))), note(to=", ".join(people))):
                peer.messages.clear()
                full.add(people[1])
                assert codes(await Lmtp(house.port, smtp=True).send(raw, *people)) == [452]
                full.clear()
                assert codes(await Lmtp(house.port, smtp=True).send(raw, *people)) == [250]
                assert {user: len(peer.messages[user]) for user in people} == {people[0]: 1, people[1]: 1}


async def test_who_has_it_and_who_has_not_is_said_when_smtp_has_one_answer(people: list[str], tmp_path: Path) -> None:
    async with ScriptedLmtp(after_data=lambda user: "550 5.7.1 no" if user == people[1] else None) as peer:
        house = House(tmp_path / "store", peer.port, protocol="smtp", identities=keys_of(people))
        async with house.running():
            raw = sealed_for(house, people, note(to=", ".join(people)))
            [answer] = await Lmtp(house.port, smtp=True).send(raw, *people)
    assert answer.startswith("554")
    assert f"Delivered to {people[0]}" in answer
    assert f"Refused for {people[1]}: no" in answer


async def test_a_client_that_left_before_the_answer_and_comes_again_gets_no_second_copy(
        people: list[str], tmp_path: Path) -> None:
    """RFC 1047: it could not read our 250. What it brings again is answered, and neither delivered again nor called a repeat."""
    async with ScriptedLmtp(slow=0.3) as peer:
        house = House(tmp_path / "store", peer.port, identities=keys_of(people[:1]))
        async with house.running():
            raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
            await Lmtp(house.port).send(raw, people[0], quit_first=True)
            await peer.arrived(people[0], 1)
            for _ in range(100):
                if not len(house.connections):
                    break
                await asyncio.sleep(0.05)
            assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
            assert len(peer.messages[people[0]]) == 1
            assert not peer.messages[QUARANTINE]


async def test_a_connection_lost_after_the_dot_leaves_it_in_doubt(people: list[str], tmp_path: Path) -> None:
    """Nobody knows whether it was taken: it is delivered again, once it is certain that nobody is at it, and says so."""
    ahead = [0]
    async with ScriptedLmtp(after_data=lambda user: "drop" if not ahead[0] else None) as peer:
        house = House(tmp_path / "store", peer.port, identities=keys_of(people[:1]), seconds=30,
                      clock=lambda: now_ms() + ahead[0])
        async with house.running():
            raw = house.sender.seal(note(to=people[0]), house.identities[people[0]])
            assert codes(await Lmtp(house.port).send(raw, people[0])) == [451]
            assert codes(await Lmtp(house.port).send(raw, people[0])) == [451]
            assert len(peer.messages[people[0]]) == 1       # taken, then the line broke
            ahead[0] = 31_000
            assert codes(await Lmtp(house.port).send(raw, people[0])) == [250]
    again = message_from_bytes(peer.messages[people[0]][-1])
    assert verdict(again) == "FRESH"
    assert "notes=AGAIN" in " ".join(str(again["Malote-Verdict"]).split())


async def test_a_next_server_that_is_not_there_is_a_failure_for_now(people: list[str], tmp_path: Path) -> None:
    async with ScriptedLmtp() as peer:
        port = peer.port
    house = House(tmp_path / "store", port, identities=keys_of(people[:1]))
    async with house.running():
        with pytest.raises(AssertionError, match="451"):
            await Lmtp(house.port).send(note(to=people[0]), people[0])


# --- loops


async def test_two_gateways_that_forward_to_each_other_end_in_one_refusal(tmp_path: Path) -> None:
    """Each waits for the other's answer to RCPT, before there is a header to count hops in: MAIL counts them."""
    first = House(tmp_path / "first", 1, name="one.test.example")
    second = House(tmp_path / "second", 1, name="two.test.example")
    first.port, second.port = free_port(), free_port()
    first.next_hop, second.next_hop = second.port, first.port
    async with first.running(card=False), second.running(card=False):
        answers = await Lmtp(first.port).send(note(), "someone@test.example")
    assert len(answers) == 1
    assert answers[0].startswith("554 5.4.6")


async def test_a_message_that_has_passed_here_too_often_is_refused(house: House, dovecot: Dovecot, people: list[str]) -> None:
    """What a queue between the gateways hides from each other, the trace shows."""
    when = b"Tue, 24 Nov 2026 10:00:00 +0000\r\n"
    ours = f"Received: from a ([127.0.0.1])\r\n by {house.name} (malote) with LMTP;\r\n ".encode() + when
    for lines in (ours * 9, (b"Received: from a by b; " + when) * 51):
        answers = await Lmtp(house.port).send(lines + note(to=people[0]), *people)
        assert [answer[:9] for answer in answers] == ["554 5.4.6"] * 2
    assert not inbox(dovecot, people[0])

