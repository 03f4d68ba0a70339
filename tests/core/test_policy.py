"""The table decides, nobody goes below it, and a refusal says what is missing and the way out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.config import Level, RuleConfig
from malote.core.encrypted import Encrypted
from malote.core.message import Control
from malote.core.policy import (
    MAX_NAMED,
    Action,
    Decision,
    Missing,
    ceiling_of,
    check_mix,
    check_recipients,
    decide_envelope,
    decide_level,
    decide_recipient,
    find_rule,
    rule_faults,
)
from malote.errors import KeyMissing, PolicyRefused, SenderRefused

ALICE, BOB = "alice@a.example", "bob@b.example"
REQUIRE, PREFER, NEVER = (RuleConfig(seal=level) for level in (Level.REQUIRE, Level.PREFER, Level.NEVER))
STRENGTH = {Level.NEVER: 0, Level.PREFER: 1, Level.REQUIRE: 2}


def decide(*rules: RuleConfig, recipient: str = BOB, card: bool = False, had_card: bool | None = None,
           control: Control | None = None, reply: bool = False, encrypted: Encrypted = "no", identity: bool = True) -> Decision:
    return decide_recipient(
        rules, ALICE, recipient, card=card, had_card=card if had_card is None else had_card, control=control, reply=reply,
        encrypted=encrypted, identity=identity,
    )


@pytest.mark.parametrize(("rules", "facts", "action"), [
    # the default row: prefer
    ((), {}, Action.PLAIN),
    ((), {"card": True}, Action.SEAL),
    # ... and require for whoever ever had a card: losing it must not turn mail clear
    ((), {"had_card": True}, Action.REFUSE),
    ((PREFER,), {"had_card": True}, Action.REFUSE),
    ((REQUIRE,), {}, Action.REFUSE),
    ((REQUIRE,), {"card": True}, Action.SEAL),
    # never is a ceiling: the administrator's word against card, history and user
    ((NEVER,), {"card": True}, Action.PLAIN),
    ((NEVER,), {"had_card": True}, Action.PLAIN),
    ((NEVER,), {"control": "yes"}, Action.PLAIN),
    # the user can ask for more
    ((), {"control": "yes"}, Action.REFUSE),
    ((), {"control": "yes", "card": True}, Action.SEAL),
    # ... and for less only where the administrator lets him
    ((), {"control": "no", "card": True}, Action.SEAL),
    ((REQUIRE,), {"control": "no"}, Action.REFUSE),
    ((RuleConfig(allow_no=True),), {"control": "no", "card": True}, Action.PLAIN),
    ((RuleConfig(seal=Level.REQUIRE, allow_no=True),), {"control": "no"}, Action.PLAIN),
    ((RuleConfig(seal=Level.REQUIRE, allow_no=True),), {}, Action.REFUSE),
    ((RuleConfig(allow_no=True),), {"had_card": True}, Action.REFUSE),
    # a reply to sealed mail quotes it: to nobody in clear
    ((), {"reply": True}, Action.REFUSE),
    ((), {"reply": True, "card": True}, Action.SEAL),
    ((NEVER,), {"reply": True}, Action.PLAIN),
    ((RuleConfig(allow_no=True),), {"reply": True, "control": "no"}, Action.PLAIN),
    # the first rule that matches
    ((RuleConfig(recipients=("@c.example",), seal=Level.NEVER), REQUIRE), {}, Action.REFUSE),
    ((RuleConfig(recipients=("@b.example",), seal=Level.NEVER), REQUIRE), {"card": True}, Action.PLAIN),
    # without an identity nothing is sealed unsigned: plain where clear is allowed, refused where it is not
    ((), {"identity": False}, Action.PLAIN),
    ((), {"identity": False, "card": True}, Action.REFUSE),
    ((REQUIRE,), {"identity": False, "card": True}, Action.REFUSE),
    ((NEVER,), {"identity": False, "card": True}, Action.PLAIN),
    # OpenPGP and S/MIME are sealed like any mail, unless the rule accepts them
    ((REQUIRE,), {"encrypted": "openpgp"}, Action.REFUSE),
    ((REQUIRE,), {"encrypted": "smime", "card": True}, Action.SEAL),
    ((RuleConfig(seal=Level.REQUIRE, accept_encrypted=True),), {"encrypted": "openpgp"}, Action.PLAIN),
    ((RuleConfig(seal=Level.REQUIRE, accept_encrypted=True),), {"encrypted": "smime", "card": True}, Action.PLAIN),
    ((RuleConfig(seal=Level.REQUIRE, accept_encrypted=True),), {"encrypted": "no"}, Action.REFUSE),
    # what we sealed already is sealed
    ((REQUIRE,), {"encrypted": "malote"}, Action.PLAIN),
    ((REQUIRE,), {"encrypted": "malote", "card": True, "control": "yes"}, Action.PLAIN),
])
def test_each_action(rules: tuple[RuleConfig, ...], facts: dict[str, Any], action: Action) -> None:
    """The design's paragraph, row by row."""
    assert decide(*rules, **facts).action is action


levels = st.builds(RuleConfig, seal=st.sampled_from(Level), allow_no=st.booleans(), accept_encrypted=st.booleans(),
                   mixed=st.sampled_from(["refuse", "split"]))
controls = st.sampled_from([None, "yes", "no"])


@given(levels, st.booleans(), st.booleans(), controls, st.booleans())
def test_nothing_goes_below_the_floor(
    rule: RuleConfig, card: bool, had_card: bool, control: Control | None, reply: bool,
) -> None:
    """No header and no history makes less than the table says, nor more than its ceiling; and history only adds."""
    level = decide_level(rule, card=card, had_card=had_card, control=control, reply=reply)
    assert STRENGTH[level] <= STRENGTH[ceiling_of(rule, control)]
    if not rule.allow_no:
        assert STRENGTH[level] >= STRENGTH[rule.seal]
        assert STRENGTH[level] >= STRENGTH[decide_level(rule, card=False, had_card=False, control=None)]
    assert STRENGTH[level] >= STRENGTH[decide_level(rule, card=False, had_card=False, control=control)]
    asked = card or had_card or reply or control == "yes"
    if asked and rule.seal is not Level.NEVER and not (rule.allow_no and control == "no"):
        assert level is Level.REQUIRE


@given(st.lists(levels, max_size=3), st.booleans(), st.booleans(), controls,
       st.sampled_from(["no", "openpgp", "smime", "malote"]), st.booleans())
def test_clear_only_where_allowed(rules: list[RuleConfig], card: bool, had_card: bool, control: Control | None,
                                  encrypted: Encrypted, identity: bool) -> None:
    """Clear text leaves only at a level below require; sealed only with card and identity; a refusal names what is missing."""
    decision = decide(*rules, card=card, had_card=card or had_card, control=control, encrypted=encrypted, identity=identity)
    if decision.clear:
        assert decision.level is not Level.REQUIRE
        assert encrypted == "no"
    if decision.action is Action.SEAL:
        assert card
        assert identity
    assert (decision.action is Action.REFUSE) == (decision.missing is not Missing.NOTHING)
    must = decision.level is Level.REQUIRE and not decision.covered
    assert (decision.action is Action.REFUSE) == (must and not (card and identity))


@given(st.lists(levels, max_size=3), st.booleans(), st.booleans())
def test_rcpt_refuses_only_what_data_would(rules: list[RuleConfig], card: bool, had_card: bool) -> None:
    """A refusal at RCPT is final, so no content and no header may exist that would have been let through (but our own format,
    which a rule must accept)."""
    refused = decide_envelope(rules, ALICE, BOB, card=card, had_card=had_card)
    outcomes = {
        decide(*rules, card=card, had_card=had_card, control=control, encrypted=encrypted).action
        for control in (None, "yes", "no") for encrypted in ("no", "openpgp", "smime")
    }
    assert (refused is not None) == (outcomes == {Action.REFUSE})


def test_what_the_refusal_says() -> None:
    """Who, what is missing, that nothing was sent, and what to do; ASCII, as the client may not know SMTPUTF8."""
    with pytest.raises(KeyMissing) as caught:
        check_recipients([decide(REQUIRE)])
    assert str(caught.value.reply) == (
        "550 5.7.1 No key for bob@b.example; nothing was sent. Ask them for their card and `malote keys import` it"
    )
    with pytest.raises(KeyMissing, match=r"j\\xf6rg@b\.example"):
        check_recipients([decide(REQUIRE, recipient="jörg@b.example")])
    with pytest.raises(SenderRefused, match=r"No identity for alice@a\.example .* nothing was sent. `malote keys new"):
        check_recipients([decide(REQUIRE, card=True, identity=False)])
    with pytest.raises(KeyMissing, match=r"This answers sealed mail, but there is no key for bob@b\.example; nothing was sent"):
        check_recipients([decide(reply=True)])
    check_recipients([decide(card=True), decide()])


def test_a_refusal_of_many_names_them() -> None:
    many = [decide(REQUIRE, recipient=f"r{number}@b.example") for number in range(MAX_NAMED + 3)]
    with pytest.raises(KeyMissing, match=r"r0@b\.example, r1@b\.example, .*r9@b\.example and 3 more; nothing was sent"):
        check_recipients([decide(card=True), *many])


SPLIT = RuleConfig(recipients=("@split.example",), mixed="split")


@pytest.mark.parametrize(("decisions", "refused"), [
    ([decide(card=True), decide(recipient="carol@c.example")], True),
    ([decide(card=True), decide(card=True, recipient="carol@c.example")], False),
    ([decide(), decide(recipient="carol@c.example")], False),
    # the rule of the clear one allows it
    ([decide(card=True), decide(SPLIT, recipient="x@split.example")], False),
    # ... of every clear one
    ([decide(card=True), decide(SPLIT, recipient="x@split.example"), decide(recipient="carol@c.example")], True),
    # the rule of the sealed one does not speak for the clear one
    ([decide(SPLIT, recipient="x@split.example", card=True), decide()], True),
    # encrypted already is not clear
    ([decide(card=True), decide(encrypted="openpgp", recipient="carol@c.example")], False),
    # an explicit never is clear too
    ([decide(card=True), decide(NEVER, recipient="carol@c.example")], True),
    ([decide(card=True), decide(RuleConfig(seal=Level.NEVER, mixed="split"), recipient="carol@c.example")], False),
    ([], False),
])
def test_sealed_and_clear_do_not_mix(decisions: list[Decision], refused: bool) -> None:
    """RFC 9787 9.6: encrypted for some and clear for others helps nobody, unless somebody decided so."""
    if not refused:
        check_mix(decisions)
        return
    with pytest.raises(PolicyRefused) as caught:
        check_mix(iter(decisions))
    assert caught.value.reply.code == 550
    assert "nothing was sent" in caught.value.reply.text
    for decision in decisions:
        if decision.clear and decision.mixed != "split":
            assert decision.recipient in caught.value.reply.text


@pytest.mark.parametrize(("pattern", "recipient", "matches"), [
    ("*", BOB, True),
    ("@b.example", BOB, True),
    ("@B.Example", BOB, True),
    ("@b.example", "bob@sub.b.example", False),
    ("@b.example", "bob@evilb.example", False),
    ("@*.b.example", "bob@sub.b.example", True),
    ("@*.b.example", "bob@a.sub.b.example", True),
    ("@*.b.example", BOB, False),
    ("@*.b.example", "bob@xb.example", False),
    ("Bob@B.example", BOB, True),
    ("bob@b.example", "bobby@b.example", False),
    ("@bücher.example", "bob@xn--bcher-kva.example", True),
    ("@*.bücher.example", "bob@a.xn--bcher-kva.example", True),
])
def test_patterns(pattern: str, recipient: str, matches: bool) -> None:
    """A rule meets its recipients however it is spelled, and nobody else."""
    assert find_rule([RuleConfig(recipients=("x@y.example", pattern))], recipient)[0] == (0 if matches else None)


def test_rules_are_checked_before_use() -> None:
    """A pattern that matches nobody because of its spelling would leave the default in force: every fault is named."""
    assert rule_faults([RuleConfig(recipients=("*", "@b.example", "@*.b.example", BOB))]) == []
    bad = [RuleConfig(recipients=each) for each in (("*@b.example", BOB), ("b.example", "@", "@*"), ())]
    assert [line.split(" names ")[0] for line in rule_faults(bad)] == [
        "outgoing.rules.1.recipients: '*@b.example'", "outgoing.rules.2.recipients: 'b.example'",
        "outgoing.rules.2.recipients: '@'", "outgoing.rules.2.recipients: '@*'", "outgoing.rules.3.recipients:",
    ]


def test_the_log_says_which_rule() -> None:
    assert decide(REQUIRE, card=True).reason == "has a card (rule 1: require)"
    assert decide().reason == "no card (default rule: prefer)"
    assert decide(NEVER, card=True).rule == 0
    assert (decide().rule, decide().list) == (None, False)
    assert decide(RuleConfig(list=True, mixed="split", accept_encrypted=True)).list
