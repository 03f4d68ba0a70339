"""What a gateway carries on, byte for byte, and whose answer is whose when the next server does not take it for all."""

from __future__ import annotations

import asyncio
from email import message_from_bytes
from pathlib import Path

import pytest

from lab.gateway import House, Lmtp, ScriptedLmtp, codes, person, sealed_for
from lab.incoming import note, verdicts

PEOPLE = ["anna@test.example", "ben@test.example", "carl@test.example"]
HEAD = b"From: a@sender.example\r\nTo: anna@test.example\r\n"


@pytest.mark.parametrize("content", [
    pytest.param(HEAD + "Subject: Grüße\r\n\r\nGuten Tag\r\n".encode(), id="utf-8 header"),
    pytest.param(HEAD + b"\r\n" + bytes(range(1, 10)) + bytes(range(14, 256)) + b"\r\n", id="any byte"),
    pytest.param(HEAD + b"\r\n" + b"x" * 200_000 + b"\r\n", id="a long line"),
    pytest.param(HEAD + b"\r\n.\r\n..\r\n.a\r\n\r\n.\r\n", id="dots"),
    pytest.param(HEAD + b"Received: from x by y; Tue, 24 Nov 2026 10:00:00 +0000\r\nBcc: x@y.example\r\n\r\n", id="odd fields"),
    pytest.param(b"\r\nno header\r\n", id="no header"),
    pytest.param(b"no header\r\n", id="no field"),
    pytest.param(b" folded\r\n\r\nx\r\n", id="begins in a fold"),
    pytest.param(HEAD + b"\r\n" + b"0123456789abcdef" * 4 * 655_360 + b"\r\n", id="40 MB"),
])
@pytest.mark.parametrize("keys", [False, True])
async def test_unsealed_mail_is_carried_byte_for_byte(content: bytes, keys: bool, tmp_path: Path) -> None:
    """Below one line of trace; also for people with keys here, whose mail is looked into."""
    async with ScriptedLmtp() as peer:
        house = House(tmp_path / "store", peer.port, identities={PEOPLE[0]: person(PEOPLE[0])} if keys else {})
        async with house.running():
            mail = "BODY=8BITMIME"
            assert codes(await Lmtp(house.port).send(content, *PEOPLE[:2], mail=mail)) == [250, 250]
    for user in PEOPLE[:2]:
        [arrived] = peer.messages[user]
        assert arrived.startswith(b"Received: from ")
        assert arrived.endswith(content)
        trace = arrived.removesuffix(content)
        assert trace.count(b"\r\n") == 3
        assert trace.startswith(b"Received:")


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_each_recipient_gets_the_next_servers_answer_to_him(is_sealed: bool, tmp_path: Path) -> None:
    """Taken, full for now, refused for good: in the order of RCPT, whether they shared a transaction or had one each."""
    said = {PEOPLE[1]: "452 4.2.2 full", PEOPLE[2]: "550 5.7.1 no"}
    async with ScriptedLmtp(after_data=said.get) as peer:
        house = House(tmp_path / "store", peer.port, identities={name: person(name) for name in PEOPLE})
        async with house.running():
            original = note(to=", ".join(PEOPLE))
            raw = sealed_for(house, PEOPLE, original) if is_sealed else original
            assert codes(await Lmtp(house.port).send(raw, *PEOPLE)) == [250, 452, 550]
            said.clear()
            assert codes(await Lmtp(house.port).send(raw, PEOPLE[1])) == [250]
    assert {user: len(messages) for user, messages in peer.messages.items()} == {PEOPLE[0]: 1, PEOPLE[1]: 1}
    if is_sealed:
        for user in PEOPLE[:2]:
            assert verdicts([message_from_bytes(raw) for raw in peer.messages[user]]) == ["FRESH"]


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_a_line_that_breaks_between_two_answers(is_sealed: bool, tmp_path: Path) -> None:
    """Who was answered has it and is told so; for whom no answer came it is 451, and he gets it when it comes again."""
    cut = [True]
    async with ScriptedLmtp(after_data=lambda user: "drop" if cut[0] and user == PEOPLE[1] else None) as peer:
        house = House(tmp_path / "store", peer.port, identities={name: person(name) for name in PEOPLE}, seconds=0.5)
        async with house.running():
            original = note(to=", ".join(PEOPLE[:2]))
            raw = sealed_for(house, PEOPLE[:2], original) if is_sealed else original
            assert codes(await Lmtp(house.port).send(raw, *PEOPLE[:2])) == [250, 451]
            cut.clear()
            cut.append(False)
            house.turns.at_most_ms = 0
            assert codes(await Lmtp(house.port).send(raw, PEOPLE[1])) == [250]
    assert len(peer.messages[PEOPLE[0]]) == 1
    again = peer.messages[PEOPLE[1]]
    assert len(again) == 2      # it was taken before the line broke; nobody can know
    if is_sealed:
        assert "notes=AGAIN" in " ".join(str(message_from_bytes(again[1])["Malote-Verdict"]).split())


async def test_two_nodes_on_one_postgresql_make_one_of_the_same_mail_fresh(postgres_url: str, tmp_path: Path) -> None:
    """Each of them has a memory of its own and the store in common: who comes second is told to wait, or that it is a repeat."""
    identities = {PEOPLE[0]: person(PEOPLE[0])}
    async with ScriptedLmtp(slow=0.2) as peer:
        nodes = [House(tmp_path / name, peer.port, identities=identities, place=postgres_url) for name in ("one", "two")]
        nodes[1].sender = nodes[0].sender
        async with nodes[0].running(), nodes[1].running(card=False):
            for count in range(1, 4):
                raw = sealed_for(nodes[0], PEOPLE[:1], note(str(count), to=PEOPLE[0]), serial=count)
                answers = await asyncio.gather(*(Lmtp(node.port).send(raw, PEOPLE[0]) for node in nodes * 2))
                said = [code for each in answers for code in codes(each)]
                assert set(said) <= {250, 451}
                assert codes(await Lmtp(nodes[count % 2].port).send(raw, PEOPLE[0])) == [250]
                fresh = verdicts([message_from_bytes(each) for each in peer.messages[PEOPLE[0]]])
                assert fresh == ["FRESH"] * count
                assert len(peer.messages["quarantine@test.example"]) == said.count(250)     # all but the first, and the last
                peer.messages["quarantine@test.example"].clear()
