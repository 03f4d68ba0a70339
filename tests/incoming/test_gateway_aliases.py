"""Aliases and lists around the opening listener, with a real Postfix that expands them: who gets what, and what it is called."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import Callable, Iterator
from email import message_from_bytes
from pathlib import Path

import pytest

from lab.gateway import House, person, sealed_for
from lab.incoming import note, verdicts
from lab.servers import HOST, Dovecot, Lab, Postfix, free_port
from malote.core.identity import Identity

INFO, GATEWAY = "info@test.example", "@test.example"


@pytest.fixture
def people(unused_users: Iterator[str]) -> list[str]:
    return [next(unused_users), next(unused_users)]


def aliases(people: list[str]) -> dict[str, str]:
    return {"virtual_alias_maps": f"inline:{{ {{ {INFO} = {', '.join(people)} }} }}", "virtual_alias_domains": ""}


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not await asyncio.to_thread(happened):
            await asyncio.sleep(0.1)


async def arrived(dovecot: Dovecot, people: list[str], counts: list[int], *queues: Postfix) -> dict[str, list[bytes]]:
    """What each of them has, once all of it is there and nothing more is on its way."""
    await until(lambda: [len(dovecot.messages(user)) for user in people] >= counts and not any(each.queued() for each in queues))
    return {user: [raw.replace(b"\r\n", b"\n") for raw in dovecot.messages(user)] for user in people}


def hand_in(port: int, raw: bytes, *recipients: str) -> None:
    with smtplib.SMTP(HOST, port, timeout=30) as client:
        client.sendmail("anna@sender.example", recipients, raw)


def said(messages: list[bytes]) -> list[str]:
    return verdicts([message_from_bytes(each) for each in messages])


async def test_expanded_behind_malote(lab: Lab, dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    """As docs/gateway.md shows it: Postfix hands the mail to malote with the address that the sender wrote to, and expands what
    comes back. One message, opened once, FRESH for the alias, and each of the people gets that; who was named too gets both."""
    back, port = free_port(), free_port()
    postfix = lab.postfix(dovecot.lmtp_hop, settings={
        **aliases(people), "content_filter": f"lmtp:inet:{HOST}:{port}", "receive_override_options": "no_address_mappings"},
        services=f"{HOST}:{back} inet n - n - - smtpd\n  -o content_filter=\n  -o receive_override_options=no_milters\n")
    house = House(tmp_path / "store", back, next_protocol="smtp", port=port, identities={GATEWAY: person(GATEWAY)})
    original, second, plain = note(to=INFO), note("both", to=f"{INFO}, {people[0]}"), note("plain", to=INFO)
    async with house.running():
        await asyncio.to_thread(hand_in, postfix.port, sealed_for(house, [INFO], original), INFO)
        got = await arrived(dovecot, people, [1, 1], postfix)
        await asyncio.to_thread(hand_in, postfix.port, plain, INFO)
        raw = sealed_for(house, [INFO, people[0]], second, serial=2)
        await asyncio.to_thread(hand_in, postfix.port, raw, INFO, people[0])
        later = await arrived(dovecot, people, [4, 3], postfix)
    postfix.stop()
    for user in people:
        assert said(got[user]) == ["FRESH"]
        assert got[user][0].endswith(original.replace(b"\r\n", b"\n"))
        assert INFO in " ".join(str(message_from_bytes(got[user][0])["Malote-Verdict"]).split())
        assert sum(raw.endswith(plain.replace(b"\r\n", b"\n")) for raw in later[user]) == 1
    assert {user: len(messages) for user, messages in later.items()} == {people[0]: 4, people[1]: 3}
    assert sorted(said(later[people[0]])) == ["FRESH", "FRESH", "FRESH", "None"]


@pytest.mark.parametrize("own_key", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_expanded_before_malote(own_key: bool, lab: Lab, dovecot: Dovecot, people: list[str], tmp_path: Path) -> None:
    """Nothing is lost or doubled, but the sender wrote to somebody else: opened with the key of the domain it is NOT-FOR-ME for
    each, and what only the key of the alias opens stays sealed. Who was named himself too has his own copy FRESH, once."""
    identities: dict[str, Identity] = {INFO: person(INFO)} if own_key else {GATEWAY: person(GATEWAY)}
    house = House(tmp_path / "store", dovecot.lmtp_port, identities=identities)
    async with house.running():
        postfix = lab.postfix(f"lmtp:inet:{HOST}:{house.port}", settings=aliases(people))
        raw = sealed_for(house, [INFO], note(to=INFO))
        await asyncio.to_thread(hand_in, postfix.port, raw, INFO)
        got = await arrived(dovecot, people, [1, 1], postfix)
        if not own_key:
            both = sealed_for(house, [INFO, people[0]], note(to=f"{INFO}, {people[0]}"), serial=2)
            await asyncio.to_thread(hand_in, postfix.port, both, INFO, people[0])
            got = await arrived(dovecot, people, [2, 2], postfix)
        postfix.stop()
    if own_key:
        assert all(got[user][0].endswith(raw.replace(b"\r\n", b"\n")) and len(got[user]) == 1 for user in people)
    else:
        assert {user: sorted(said(got[user])) for user in people} == {
            people[0]: ["FRESH", "NOT-FOR-ME"], people[1]: ["NOT-FOR-ME", "NOT-FOR-ME"]}
