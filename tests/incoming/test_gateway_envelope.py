"""What an opened message needs of the servers behind a gateway, which its sealed form did not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from email import message_from_bytes
from pathlib import Path

from lab.gateway import House, Lmtp, ScriptedLmtp, codes, person
from lab.incoming import note
from lab.servers import HOST, Dovecot, Lab


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(40):
        while not await asyncio.to_thread(happened):
            await asyncio.sleep(0.05)


def said(raw: bytes) -> str:
    return " ".join(str(message_from_bytes(raw)["Malote-Verdict"]).split())


async def test_a_header_in_utf8_goes_on_as_it_came(lab: Lab, dovecot: Dovecot, unused_users: Iterator[str],
                                                   tmp_path: Path) -> None:
    """A server behind that knows SMTPUTF8 bounces what was declared so once it comes to one that does not. Undeclared, as such
    headers are sent everywhere, it arrives."""
    user = next(unused_users)
    back = lab.postfix(dovecot.lmtp_hop)
    house = House(tmp_path / "store", back.port, next_protocol="smtp", identities={user: person(user)})
    original = note(to=user).replace(b"Subject: ", "Subject: für ".encode())
    async with house.running():
        raw = house.sender.seal(original, house.identities[user], frame=note(to=user))
        assert codes(await Lmtp(house.port).send(raw, user)) == [250]
        await until(lambda: not back.queued())
    back.stop()
    [arrived] = dovecot.messages(user)
    assert arrived.replace(b"\r\n", b"\n").endswith(original.replace(b"\r\n", b"\n"))
    assert said(arrived).startswith("FRESH")


async def test_what_is_bounced_behind_the_gateway_does_not_go_back_in_clear(
        lab: Lab, dovecot: Dovecot, unused_users: Iterator[str], tmp_path: Path) -> None:
    """A server that takes opened mail and cannot deliver it tells the sender, and sends him no more of it than its header. Mail
    that was not sealed is returned as its sender asked for."""
    user, sender = next(unused_users), next(unused_users)
    house = House(tmp_path / "store", 0, next_protocol="smtp", identities={user: person(user)})
    async with ScriptedLmtp(after_data=lambda _user: "552 5.2.2 full") as full, contextlib.AsyncExitStack() as stack:
        back = lab.postfix(dovecot.lmtp_hop, settings={
            "transport_maps": f"inline:{{ {{ {user} = lmtp:inet:{HOST}:{full.port} }} }}"})
        house.next_hop = back.port
        await stack.enter_async_context(house.running())
        raw = house.sender.seal(note(to=user, body="the secret text\r\n"), house.identities[user])
        plain = note(to=user, body="no secret\r\n")
        for content, mail in ((raw, "RET=FULL ENVID=one"), (plain, "RET=FULL")):
            assert codes(await Lmtp(house.port).send(content, user, sender=sender, mail=mail)) == [250]
        await until(lambda: len(dovecot.messages(sender)) >= 2 and not back.queued())
    back.stop()
    bounces = dovecot.messages(sender)
    assert len(bounces) == 2
    assert not any(b"the secret text" in each for each in bounces)
    assert sum(b"no secret" in each for each in bounces) == 1
    assert sum(b"Original-Envelope-Id: one" in each for each in bounces) == 1
