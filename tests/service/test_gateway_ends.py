"""Who is at the two ends of sealed mail, over real servers: a person or a domain's gateway, and people behind an alias."""

from __future__ import annotations

import json
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from lab.daemon import Home, free_port, listener, rule, upstream
from lab.incoming import note
from lab.servers import HOST, Dovecot, Lab
from malote.core.card import Card, parse_armored
from outgoing.harness import submit
from service.test_gateway import gateway, users, wait_for

__all__ = ["users"]     # a fixture

ANNA, DORA, OURS = "anna@sender.example", "dora@sender.example", "@sender.example"
NOTES = ("FROM-GATEWAY", "TO-GATEWAY")


def keys_for(home: Home, *addresses: str) -> dict[str, Card]:
    for address in addresses:
        home.keys("new", address, "--algorithm", "ed25519")
    return {address: parse_armored(home.keys("export", address))[0] for address in addresses}


def exchange(one: Home, other: Home, addresses: dict[str, Card]) -> None:
    for address in addresses:
        path = other.root / "card"
        path.write_text(one.keys("export", address))
        other.keys("import", str(path))


def said(raw: bytes) -> str:
    return " ".join(str(message_from_bytes(raw)["Malote-Verdict"]).split())


@pytest.mark.long
def test_a_persons_own_key_is_used_and_the_gateways_for_who_has_none(home: Home, lab: Lab, dovecot: Dovecot, tmp_path: Path,
                                                                     users: Callable[[], str]) -> None:
    """From a sealing relay through Postfix to an opening gateway, both holding keys of persons and of their domain: each mail is
    sealed for the person and signed by the person where there are such keys, and verdict, log and audit log tell which it was."""
    ben, carol, port, office_port = users(), users(), free_port(), free_port()
    front = lab.postfix(f"lmtp:inet:{HOST}:{port}")
    office = Home(tmp_path / "office")
    office.configure(listener(office_port, 'auth = "none"') + upstream(front.port, None) + rule("require")
                     + f'[audit]\nfile = "{office.root}/audit"\n')
    gateway(home, port, dovecot.lmtp_port)
    senders, receivers = keys_for(office, ANNA, OURS), keys_for(home, ben, "@test.example")
    exchange(office, home, senders)
    exchange(home, office, receivers)
    with home.daemon() as daemon, office.daemon() as sealing:
        for number, sender in enumerate((ANNA, DORA), 1):
            assert submit(office_port, sender, [ben, carol], note(sender=sender, to=f"{ben}, {carol}")).code == 250
            arrived = {user: wait_for(dovecot, user, number, daemon) for user in (ben, carol)}
        assert sealing.stop() == 0
        assert daemon.stop() == 0
    front.stop()
    by = {(sender, user): said(raw) for user, messages in arrived.items() for raw in messages
          for sender in (ANNA, DORA) if f"<{sender}>".encode() in raw}
    assert {ends: [name for name in NOTES if name in text.partition("text=")[0]] for ends, text in by.items()} == {
        (ANNA, ben): [], (ANNA, carol): ["TO-GATEWAY"], (DORA, ben): ["FROM-GATEWAY"], (DORA, carol): [*NOTES]}
    assert all(text.startswith("FRESH") for text in by.values())
    assert "gateway of sender.example sealed it" in by[DORA, ben]
    assert "gateway of test.example opened it" in by[ANNA, carol]
    assert "gateway of" not in by[ANNA, ben]
    shown = [json.loads(line) for line in home.malote("log", "--json").stdout.splitlines()]
    assert {(line["sender"], line["account"]): line["detail"].split() for line in shown if line["outcome"] == "opened"} == {
        (ANNA, ben): [], (ANNA, carol): ["TO-GATEWAY"], (DORA, ben): ["FROM-GATEWAY"], (DORA, carol): [*NOTES]}
    left = [json.loads(line) for line in (office.root / "audit").read_text().splitlines()]
    used = [(line["signer"], sorted(line["cards"])) for line in left if line.get("what") == "sealed"]
    cards = sorted(card.fingerprint for card in receivers.values())
    assert used == [(senders[name].fingerprint, cards) for name in (ANNA, OURS)]
