"""Sealing by and for the gateway of a domain: who has keys of his own is never sealed for, or signed for, by the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from malote.errors import Unreadable
from outgoing.harness import Gateway, Upstream, opened, person, text, upstream_config

ALICE, BOB, THEIRS, OURS = person("alice@a.example"), person("bob@b.example"), person("@b.example"), person("@a.example")
CAROL = "carol@b.example"


async def test_a_persons_own_card_beats_the_gateways_on_sending(tmp_path: Path) -> None:
    """Bob's mail can be opened by Bob alone; Carol, who has no card, gets hers through the gateway of her domain."""
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=(BOB, THEIRS),
                                               identities={ALICE.address: ALICE}) as gw:
        submitted = text(ALICE.address, BOB.address)
        await gw.submit(ALICE.address, [BOB.address], submitted)
        await gw.submit(ALICE.address, [CAROL], text(ALICE.address, CAROL))
    for_bob, for_carol = (message.content for message in upstream.messages)
    assert opened(for_bob, BOB, ALICE).addressed
    with pytest.raises(Unreadable):
        opened(for_bob, THEIRS, ALICE)
    got = opened(for_carol, THEIRS, ALICE)
    assert got.addressed
    assert got.unsealed.recipient == CAROL


@pytest.mark.parametrize(("sender", "signer"), [("alice@a.example", ALICE), ("dora@a.example", OURS)])
async def test_the_gateway_signs_only_for_who_has_no_key(tmp_path: Path, sender: str, signer: object) -> None:
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=(BOB,),
                                               identities={ALICE.address: ALICE, OURS.address: OURS}) as gw:
        assert (await gw.submit(sender, [BOB.address], text(sender, BOB.address))).code == 250
    got = opened(upstream.messages[0].content, BOB, ALICE if signer is ALICE else OURS)
    assert got.signature == "valid"
    assert got.manifest.scope == ("user" if signer is ALICE else "gateway")
    assert got.manifest.sender == sender
