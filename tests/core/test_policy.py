"""The table decides, nobody goes below it, and a refusal says what is missing and the way out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malote.config import Kind, Level, OutgoingConfig, RuleConfig
from malote.core.content import Content
from malote.core.encrypted import Encrypted
from malote.core.message import Control
from malote.core.policy import (
    MAX_NAMED,
    Action,
    Decision,
    MessageDecision,
    MessageFacts,
    Missing,
    Policy,
    RecipientFacts,
    Why,
    decide_refusal,
    left_out_reply,
)
from malote.errors import KeyMissing, PolicyRefused, SenderRefused

ALICE, BOB = "alice@a.example", "bob@b.example"
REQUIRE, PREFER, NEVER, REFUSE = (RuleConfig(seal=level) for level in (Level.REQUIRE, Level.PREFER, Level.NEVER, Level.REFUSE))
STRENGTH = {Level.NEVER: 0, Level.PREFER: 1, Level.REQUIRE: 2, Level.REFUSE: 3}


def policy(*rules: RuleConfig, domains: tuple[str, ...] = (), **more: Any) -> Policy:
    return Policy(OutgoingConfig(rules=rules, domains=domains, **more))


def decide(*rules: RuleConfig, recipient: str = BOB, card: bool = False, had_card: bool | None = None, outsider: bool = False,
           domains: tuple[str, ...] = (), sender: str = ALICE, **facts: Any) -> Decision:
    return policy(*rules, domains=domains).decide_recipient(
        MessageFacts(sender, **facts), RecipientFacts(recipient, card, card if had_card is None else had_card, outsider))


def check(*decisions: Decision) -> None:
    MessageDecision(decisions, decide_refusal(decisions)).check()


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
    # refuse is the administrator's last word
    ((REFUSE,), {"card": True}, Action.REFUSE),
    ((REFUSE,), {"card": True, "control": "no"}, Action.REFUSE),
    ((REFUSE,), {"encrypted": "malote"}, Action.REFUSE),
    # who had no part in what this answers gets none of it, not even where a rule says never; unless the author insists
    ((), {"card": True, "reply": True, "outsider": True}, Action.REFUSE),
    ((NEVER,), {"reply": True, "outsider": True}, Action.REFUSE),
    ((), {"card": True, "reply": True, "outsider": True, "control": "yes"}, Action.SEAL),
    ((), {"reply": True, "outsider": True, "control": "yes"}, Action.REFUSE),
    ((), {"card": True, "reply": True, "outsider": True, "control": "no"}, Action.REFUSE),
    ((RuleConfig(allow_no=True),), {"card": True, "reply": True, "outsider": True, "control": "no"}, Action.PLAIN),
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


# ---- what the content asks for

FIELDS = {"subject": ("Offer [Secret] no. 7",), "sensitivity": ("Company-Confidential",)}
CONTENT = Content(5000, FIELDS, frozenset({Kind.CALENDAR}))


@pytest.mark.parametrize(("conditions", "met"), [
    ({"min_bytes": 5000}, True), ({"min_bytes": 5001}, False),
    ({"subjects": ("*[secret]*",)}, True), ({"subjects": ("[secret]*",)}, False), ({"subjects": ("other", "offer*7")}, True),
    ({"headers": ("Sensitivity",)}, True), ({"headers": ("sensitivity: company-*",)}, True),
    ({"headers": ("Sensitivity: personal", "X-Label")}, False),
    ({"kinds": (Kind.CALENDAR, Kind.BOUNCE)}, True), ({"kinds": (Kind.BOUNCE,)}, False),
    # of each kind of condition one must be met
    ({"min_bytes": 10, "kinds": (Kind.CALENDAR,), "subjects": ("*secret*",)}, True),
    ({"min_bytes": 10, "kinds": (Kind.CALENDAR,), "subjects": ("secret",)}, False),
])
def test_conditions_on_the_content(conditions: dict[str, Any], met: bool) -> None:
    rule = RuleConfig(seal="require", **conditions)
    decision = decide(rule, content=CONTENT)
    assert decision.level is (Level.REQUIRE if met else Level.PREFER)
    assert decision.rule == (0 if met else None)


@pytest.mark.parametrize(("rules", "facts", "level", "said"), [
    # it adds to the rule below it, also to a never ...
    ((RuleConfig(subjects=("*secret*",), seal="require"), NEVER), {}, Level.REQUIRE, (0, 1)),
    ((RuleConfig(subjects=("*secret*",), seal="refuse"), NEVER), {}, Level.REFUSE, (0, 1)),
    # ... but not to one that stands before it: the table has an order
    ((NEVER, RuleConfig(subjects=("*secret*",), seal="require")), {}, Level.NEVER, (0,)),
    # the strictest counts
    ((RuleConfig(min_bytes=1, seal="prefer"), REQUIRE), {}, Level.REQUIRE, (0, 1)),
    # what is in a message cannot weaken, unless the rule below lets users say no: it is users who write it
    ((RuleConfig(kinds=(Kind.CALENDAR,), seal="never"), REQUIRE), {}, Level.REQUIRE, (1,)),
    ((RuleConfig(kinds=(Kind.CALENDAR,), seal="never"), RuleConfig(seal="require", allow_no=True)), {}, Level.NEVER, (1,)),
    ((RuleConfig(kinds=(Kind.CALENDAR,), seal="never"), RuleConfig(allow_no=True)), {"control": "yes"}, Level.REQUIRE, (1,)),
    ((RuleConfig(kinds=(Kind.CALENDAR,), seal="never"), RuleConfig(allow_no=True)), {"reply": True}, Level.REQUIRE, (1,)),
    # a user's no must be allowed by every rule that has a say
    ((RuleConfig(subjects=("*secret*",), seal="require"), RuleConfig(allow_no=True)), {"control": "no"}, Level.REQUIRE, (0, 1)),
    ((RuleConfig(subjects=("*secret*",), seal="require", allow_no=True), RuleConfig(allow_no=True)), {"control": "no"},
     Level.NEVER, (0, 1)),
])
def test_content_only_adds(rules: tuple[RuleConfig, ...], facts: dict[str, Any], level: Level, said: tuple[int, ...]) -> None:
    decision = decide(*rules, content=CONTENT, **facts)
    assert (decision.level, decision.rules) == (level, said)


@pytest.mark.parametrize(("rule", "between", "met"), [
    ({"senders": ("alice@a.example",)}, (ALICE, BOB), True), ({"senders": ("@*.example",)}, (ALICE, BOB), True),
    ({"senders": ("@a.example",)}, ("x@c.example", BOB), False),
    ({"direction": "outbound"}, (ALICE, BOB), True), ({"direction": "outbound"}, (ALICE, "x@sub.a.example"), False),
    ({"direction": "internal"}, (ALICE, "x@sub.a.example"), True), ({"direction": "internal"}, (BOB, ALICE), False),
    ({"direction": "inbound"}, (BOB, ALICE), True), ({"direction": "inbound"}, (ALICE, ALICE), False),
    ({"direction": "internal", "senders": ("@b.example",)}, (ALICE, ALICE), False),
])
def test_rules_for_senders_and_directions(rule: dict[str, Any], between: tuple[str, str], met: bool) -> None:
    sender, recipient = between
    for more in ({}, {"recipients": ("@*.example",)}):      # however it is filed
        decision = decide(RuleConfig(seal="refuse", **rule, **more), sender=sender, recipient=recipient,
                          domains=("a.example", "*.a.example"))
        assert (decision.level is Level.REFUSE) == met


# ---- properties: a table of any rules, against a reading of it that is plain and slow

ADDRESSES = [ALICE, BOB, "carol@sub.b.example", "dora@d.example"]
PATTERNS = st.sampled_from(["*", *ADDRESSES, "@a.example", "@b.example", "@*.b.example", "@*.example", "@D.Example"])
DOMAINS = ("a.example", "*.b.example")
patterns = st.lists(PATTERNS, min_size=1, max_size=2).map(tuple) | st.just(("*",))
rules = st.builds(
    RuleConfig, recipients=patterns, senders=patterns,
    direction=st.sampled_from(["any", "any", "outbound", "internal", "inbound"]),
    min_bytes=st.sampled_from([0, 0, 0, 100]), subjects=st.sampled_from([(), (), ("*secret*",), ("*",)]),
    headers=st.sampled_from([(), (), ("X-Label: a*",)]),
    kinds=st.sampled_from([(), (), (Kind.BOUNCE,), (Kind.LIST, Kind.CALENDAR)]),
    seal=st.sampled_from(Level), allow_no=st.booleans(), accept_encrypted=st.booleans(),
    mixed=st.sampled_from(["refuse", "split"]))
tables = st.lists(rules, max_size=5).map(tuple)
contents = st.builds(
    Content, st.sampled_from([10, 1000]), st.fixed_dictionaries({}, optional={
        "subject": st.sampled_from([("secret plan",), ("lunch",)]), "x-label": st.sampled_from([("alpha",), ("beta",)])}),
    st.frozensets(st.sampled_from(Kind)))
controls = st.sampled_from([None, "yes", "no"])
encryptions = st.sampled_from(["no", "openpgp", "smime", "malote"])
senders = recipients = st.sampled_from(ADDRESSES)


def named_by(patterns: tuple[str, ...], address: str) -> bool:
    domain = address.split("@")[1]
    return any(
        pattern == "*" or pattern.lower() in (address, f"@{domain}")
        or (pattern.startswith("@*.") and domain.endswith(pattern[2:])) for pattern in patterns)


def direction_of(sender: str, recipient: str) -> str:
    def ours(address: str) -> bool:
        return named_by(("@a.example", "@*.b.example"), address)
    return "outbound" if not ours(recipient) else "internal" if ours(sender) else "inbound"


def floor_of(table: tuple[RuleConfig, ...], sender: str, recipient: str) -> RuleConfig:
    """The administrator's floor: the first rule that needs nothing of what a user writes."""
    for rule in table:
        if (not rule.on_content and named_by(rule.recipients, recipient) and named_by(rule.senders, sender)
                and rule.direction in ("any", direction_of(sender, recipient))):
            return rule
    return RuleConfig()


@given(tables, senders, recipients, contents, controls, encryptions, st.booleans(), st.booleans(), st.booleans(), st.booleans(),
       st.booleans())
@settings(max_examples=400)
def test_nothing_goes_below_the_floor(
    table: tuple[RuleConfig, ...], sender: str, recipient: str, content: Content, control: Control | None, encrypted: Encrypted,
    reply: bool, card: bool, had_card: bool, outsider: bool, identity: bool,
) -> None:
    """No user, header, tag, reply or history makes less than the administrator's table says for the envelope; the user's no
    (and content that stands for it) counts only where that rule allows it."""
    ours = policy(*table, domains=DOMAINS)
    message = MessageFacts(sender, identity, control, reply, encrypted, content)
    facts = RecipientFacts(recipient, card, card or had_card, outsider)
    decision = ours.decide_recipient(message, facts)
    rule = floor_of(table, sender, recipient)
    if not rule.allow_no or rule.seal is Level.REFUSE:
        assert STRENGTH[decision.level] >= STRENGTH[rule.seal]
        bare = ours.decide_recipient(MessageFacts(sender), RecipientFacts(recipient, card=False, had_card=False))
        assert STRENGTH[decision.level] >= STRENGTH[bare.level]
    if decision.clear:
        assert STRENGTH[decision.level] < STRENGTH[Level.REQUIRE]
        assert encrypted == "no"
        assert not outsider or control is not None
    if (card or had_card or reply or control == "yes") and rule.seal is not Level.NEVER and not rule.allow_no:
        assert STRENGTH[decision.level] >= STRENGTH[Level.REQUIRE]
    if decision.action is Action.SEAL:
        assert card
        assert identity
    if decision.level is Level.REQUIRE and decision.action is Action.PLAIN:
        assert decision.covered
    assert (decision.action is Action.REFUSE) == (decision.missing is not Missing.NOTHING)
    assert ours.decide_message(message, [facts, facts]).decisions == (decision, decision)


@given(tables, senders, recipients, st.booleans(), st.booleans())
@settings(max_examples=400)
def test_rcpt_refuses_only_what_data_would(
        table: tuple[RuleConfig, ...], sender: str, recipient: str, card: bool, had_card: bool) -> None:
    """A refusal at RCPT is final, so no sender, content or header may exist that would have been let through (but our own format,
    which a rule must accept). And where no rule asks for more than the envelope shows, all that is certain is refused there."""
    ours = policy(*table, domains=DOMAINS)
    facts = RecipientFacts(recipient, card, card or had_card)
    refused = ours.decide_envelope(facts, sender)
    outcomes = {
        ours.decide_recipient(MessageFacts(who, control=control, encrypted=encrypted, content=content), facts).action
        for who in ADDRESSES for control in (None, "yes", "no") for encrypted in ("no", "openpgp", "smime")
        for content in (Content(), Content(1000, {"subject": ("secret",), "x-label": ("a",)}, frozenset(Kind)))
    }
    if refused is not None:
        assert outcomes == {Action.REFUSE}
    elif not any(rule.on_sender or rule.on_content for rule in table):
        assert outcomes != {Action.REFUSE}


def test_what_the_refusal_says() -> None:
    """Who, what is missing, that nothing was sent, and what to do; ASCII, as the client may not know SMTPUTF8."""
    with pytest.raises(KeyMissing) as caught:
        check(*[decide(REQUIRE)])
    assert str(caught.value.reply) == (
        "550 5.7.1 No key for bob@b.example; nothing was sent. Ask them for their card and `malote keys import` it"
    )
    with pytest.raises(KeyMissing, match=r"j\\xf6rg@b\.example"):
        check(*[decide(REQUIRE, recipient="jörg@b.example")])
    with pytest.raises(SenderRefused, match=r"No identity for alice@a\.example .* nothing was sent. `malote keys new"):
        check(*[decide(REQUIRE, card=True, identity=False)])
    with pytest.raises(KeyMissing, match=r"This answers sealed mail, but there is no key for bob@b\.example; nothing was sent"):
        check(*[decide(reply=True)])
    with pytest.raises(KeyMissing, match=r"No key for bob@b\.example that is still good, .* sent. Ask them .* import"):
        check(decide(had_card=True))
    with pytest.raises(PolicyRefused, match=r"Rule 2 forbids this mail to bob@b\.example; nothing was sent\."):
        check(decide(RuleConfig(recipients=("x@y.example",)), REFUSE))
    with pytest.raises(PolicyRefused, match=r"that bob@b\.example had no part in; nothing was sent\..*Malote-Seal: yes"):
        check(decide(card=True, reply=True, outsider=True))
    tagged = policy(seal_tag="[seal]").decide_recipient(MessageFacts(ALICE, reply=True), RecipientFacts(BOB, True, True, True))
    assert "add [seal] in the subject" in tagged.reason
    check(decide(card=True))
    check(decide())


def test_a_refusal_of_many_names_them() -> None:
    many = [decide(REQUIRE, recipient=f"r{number}@b.example") for number in range(MAX_NAMED + 3)]
    with pytest.raises(KeyMissing, match=r"r0@b\.example, r1@b\.example, .*r9@b\.example and 3 more; nothing was sent"):
        check(*[decide(card=True), *many])


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
        check(*decisions)
        return
    with pytest.raises(PolicyRefused) as caught:
        check(*decisions)
    assert caught.value.reply.code == 550
    assert "nothing was sent" in caught.value.reply.text
    for decision in decisions:
        if decision.clear and decision.mixed != "split":
            assert decision.recipient in caught.value.reply.text


@pytest.mark.parametrize(("split", "others", "refused"), [
    (True, [decide(card=True)], False), (False, [decide(card=True)], True), (True, [], True),
    (True, [decide(REQUIRE, recipient="carol@c.example")], True),
    (True, [decide(recipient="carol@c.example")], False),
])
def test_who_may_not_get_it_is_left_out_only_where_his_rule_splits(split: bool, others: list[Decision], refused: bool) -> None:
    """Missing key at DATA: the whole message, or with `mixed = "split"` this recipient alone, who is then reported."""
    missing = decide(RuleConfig(seal="require", mixed="split" if split else "refuse"))
    decided = MessageDecision((missing, *others), decide_refusal((missing, *others)))
    assert (decided.refusal is not None) == refused
    assert decided.left_out == (() if refused else (missing,))
    if not refused:
        assert str(left_out_reply(missing)) == (
            "550 5.7.1 No key for bob@b.example; not sent to them. Ask them for their card and `malote keys import` it")


def test_what_was_joined_is_told() -> None:
    """For `malote explain`: the rules' own floor and ceiling, and everything that asked for more."""
    decision = decide(RuleConfig(min_bytes=1, seal="require"), PREFER, card=True, reply=True, control="yes", content=CONTENT)
    assert (decision.floor, decision.ceiling, decision.rule, decision.rules) == (Level.REQUIRE, Level.REQUIRE, 0, (0, 1))
    assert decision.why == (Why.CARD, Why.REPLY, Why.USER)
    assert decide(had_card=True).why == (Why.HISTORY,)
    assert (decide(NEVER).floor, decide(NEVER).ceiling, decide(NEVER).why) == (Level.NEVER, Level.NEVER, ())


def test_the_log_says_which_rule() -> None:
    assert decide(REQUIRE, card=True).reason == "has a card (rule 1: require)"
    assert decide().reason == "no card (default rule: prefer)"
    assert decide(NEVER, card=True).rule == 0
    assert (decide().rule, decide().list) == (None, False)
    assert decide(RuleConfig(list=True, mixed="split", accept_encrypted=True)).list
