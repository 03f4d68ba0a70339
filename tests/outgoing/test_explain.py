"""`malote explain` tells what the daemon then does: each case is explained first, and then really sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from malote.config import Config, RuleConfig
from malote.outgoing.explain import explain
from malote.store.records import LockedIdentity
from outgoing.harness import Gateway, Upstream, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))
FIRM = person("@firm.example")
STRANGER = "stranger@else.example"


@dataclass
class Case:
    rules: tuple[RuleConfig, ...] = ()
    recipients: Sequence[str] = (BOB.address,)
    content: bytes = field(default_factory=text)
    sender: str = ALICE.address
    more: dict[str, Any] = field(default_factory=dict)


REQUIRE = RuleConfig(seal="require")
SPLIT = RuleConfig(mixed="split")
CASES = {
    "a card": Case(),
    "no card": Case(recipients=[STRANGER], content=text(to=STRANGER)),
    "the gateway's card": Case(recipients=["ann@firm.example"], content=text(to="ann@firm.example")),
    "require without card": Case((REQUIRE,), [STRANGER, BOB.address]),
    "require, nobody has one": Case((REQUIRE,), [STRANGER, "other@else.example"]),
    "never": Case((RuleConfig(recipients=("@test.example",), seal="never"),)),
    "a mix that is refused": Case(recipients=[BOB.address, STRANGER], content=text(cc=STRANGER)),
    "a mix that is split": Case((SPLIT,), [BOB.address, STRANGER, CAROL.address], text(cc=STRANGER)),
    "left out": Case((RuleConfig(seal="require", mixed="split", allow_no=True),), [BOB.address, STRANGER], text(cc=STRANGER)),
    "a list": Case((RuleConfig(list=True),), [BOB.address, CAROL.address], text(to="team@test.example")),
    "each Bcc": Case(recipients=[BOB.address, CAROL.address], content=text(to="x@else.example")),
    "the user says no": Case((RuleConfig(allow_no=True),), content=text(malote_seal="no")),
    "the user says no in vain": Case(content=text(malote_seal="no")),
    "the user says yes": Case(recipients=[STRANGER], content=text(to=STRANGER, malote_seal="yes")),
    "no identity": Case(sender="nobody@test.example", content=text("nobody@test.example")),
    "refused by a rule": Case((RuleConfig(recipients=("bob@test.example",), seal="refuse"),), [BOB.address, CAROL.address]),
    "by its subject": Case((RuleConfig(subjects=("*secret*",), seal="require"),), [STRANGER], text(to=STRANGER)),
    "by its sender": Case((RuleConfig(senders=("alice@test.example",), seal="never"), REQUIRE)),
    "a route": Case(recipients=["bob%test.example@relay.example"]),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_is_explained_is_what_happens(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    config = {"rules": case.rules, "upstream": upstream_config(1)}
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=(BOB, CAROL, FIRM),
                                               config={"rules": case.rules}) as gw:
        await gw.store.put_identity(LockedIdentity(ALICE.address, ALICE.signing.public.id, b"locked", ALICE.card.raw, 1, 1))
        told = await explain(gw.store, Config(outgoing=config), case.sender, case.recipients, case.content)
        done = await gw.submit(case.sender, case.recipients, case.content)
    for answer in told.recipients:
        reply = done.rcpts[answer.recipient]
        assert reply.startswith("250") == (answer.at == "DATA"), answer
        if answer.at == "RCPT":
            assert answer.action == "refuse"
            assert reply == answer.reason
    sent = sorted((b"vnd.malote" in message.content, tuple(message.recipients)) for message in upstream.messages)
    assert sent == sorted((copy.sealed, copy.recipients) for copy in told.copies)
    if told.refusal:
        assert done.data.splitlines()[0].startswith(told.refusal.splitlines()[0])
        assert sent == []
    else:
        out = {answer.recipient: answer.action for answer in told.recipients}
        for sealed, action in ((True, "seal"), (False, "plain")):
            assert {a for is_sealed, addresses in sent for a in addresses if is_sealed is sealed} == {
                address for address, decided in out.items() if decided == action}
    assert (told.signer is not None) == any(sealed for sealed, _ in sent)


async def test_rule_card_and_source_are_named(tmp_path: Path) -> None:
    rules = (RuleConfig(recipients=("@other.example",)),
             RuleConfig(recipients=("@test.example", "@firm.example"), seal="require"))
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=(BOB, FIRM)) as gw:
        await gw.store.put_identity(LockedIdentity(ALICE.address, ALICE.signing.public.id, b"locked", ALICE.card.raw, 1, 1))
        config = Config(outgoing={"rules": rules, "upstream": upstream_config(1)})
        told = await explain(gw.store, config, ALICE.address, [BOB.address, "Zoe@Firm.example"], None)
        bob, zoe = told.recipients
        assert (bob.rule, bob.patterns, bob.level, bob.asked_by) == (2, ("@test.example", "@firm.example"), "require", ("card",))
        assert bob.card is not None
        assert (bob.card.fingerprint, bob.card.level, bob.card.source) == (BOB.card.fingerprint, "VERIFIED", "test")
        assert zoe.recipient == "zoe@firm.example"
        assert zoe.card is not None
        assert (zoe.card.address, zoe.card.fingerprint) == ("@firm.example", FIRM.card.fingerprint)
        assert told.signer is not None
        assert told.signer.fingerprint == ALICE.card.fingerprint
        await gw.store.remove_card(BOB.address)
        [bob] = (await explain(gw.store, config, ALICE.address, [BOB.address], None)).recipients
        assert (bob.action, bob.card, bob.had_card, bob.at) == ("refuse", None, True, "RCPT")
    assert upstream.wire == b"", "nobody was asked"
