"""`malote explain` tells what the daemon then does: each case is explained first, and then really sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from malote.config import Config, RuleConfig
from malote.core.policy import Policy
from malote.outgoing.explain import Explanation, explain
from malote.outgoing.shadow import summarise
from malote.store.records import LockedIdentity
from outgoing.harness import Gateway, Outcome, Upstream, person, text, upstream_config

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
    check_told(told, done, upstream)


def check_told(told: Explanation, done: Outcome, upstream: Upstream) -> None:
    """What was said is what was done."""
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


LEVELS = st.sampled_from(["require", "prefer", "never", "refuse"])
NAMES = (BOB.address, CAROL.address, "ann@firm.example", STRANGER, "other@else.example")


@st.composite
def rules(draw: st.DrawFn) -> RuleConfig:
    seal = draw(LEVELS)
    kinds: dict[str, Any] = {
        "recipients": st.sampled_from([("*",), ("@test.example",), ("@else.example", BOB.address), ("@*.example",), (STRANGER,)]),
        "senders": st.sampled_from([("*",), ("@test.example",)]),
        "subjects": st.just(("*secret*",)), "headers": st.just(("X-Class: red*",)), "min_bytes": st.sampled_from([0, 1000]),
        "mixed": st.sampled_from(["refuse", "split"]),
    }
    if seal != "refuse":
        kinds |= {"allow_no": st.booleans(), "accept_encrypted": st.booleans(), "list": st.booleans()}
    return RuleConfig(seal=seal, **{key: draw(kinds[key]) for key in draw(st.sets(st.sampled_from(sorted(kinds)), max_size=4))})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any table, any recipients shown or not, and what an author can say."""
    wanted = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    fields = {name: value for name, value in (
        ("subject", draw(st.sampled_from(["hello", "the secret plan"]))), ("x_class", draw(st.sampled_from(["", "red"]))),
        ("malote_seal", draw(st.sampled_from(["", "", "yes", "no"])))) if value}
    shown = draw(st.lists(st.sampled_from(wanted), min_size=1, unique=True))
    return Case(tuple(draw(st.lists(rules(), max_size=4))), wanted,
                text(to=", ".join(shown), body="x\r\n" * draw(st.sampled_from([1, 500])), **fields))


@given(case=cases())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mail_under_any_rules_becomes_what_explain_and_shadow_mode_say(
        tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    """Explained, then sent in shadow mode, then sent in earnest: three times the same answer for each recipient."""
    asyncio.run(_explained_and_done(tmp_path_factory.mktemp("any"), case))


async def _explained_and_done(directory: Path, case: Case) -> None:
    config = Config(outgoing={"rules": case.rules, "upstream": upstream_config(1)})
    async with Upstream() as upstream, Gateway(directory, upstream_config(upstream.port), cards=(BOB, CAROL, FIRM),
                                               config={"rules": case.rules, "shadow": True}) as gw:
        await gw.store.put_identity(LockedIdentity(ALICE.address, ALICE.signing.public.id, b"locked", ALICE.card.raw, 1, 1))
        told = await explain(gw.store, config, case.sender, case.recipients, case.content)
        assert (await gw.submit(case.sender, case.recipients, case.content)).code == 250
        judged = summarise(await gw.store.recent_outcomes(100)).actions
        upstream.messages.clear()
        gw.submissions.decider.policy = Policy(config.outgoing)
        done = await gw.submit(case.sender, case.recipients, case.content)
    check_told(told, done, upstream)
    actions = Counter("refuse" if told.refusal else answer.action for answer in told.recipients)
    assert judged == {action.removeprefix("would-"): count for action, count in actions.items()}


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
