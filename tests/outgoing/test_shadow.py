"""Shadow mode: the rules are asked and not obeyed, mail passes byte for byte, and what would have been done is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from malote.config import Config, OutgoingConfig, RuleConfig
from malote.core.policy import Policy
from malote.core.rules import rule_faults
from malote.outgoing.deciding import Decider
from malote.outgoing.explain import explain
from malote.outgoing.shadow import Summary, shadow_warnings, summarise
from outgoing.harness import Gateway, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))
STRANGER = "stranger@else.example"
REQUIRE = RuleConfig(seal="require")


def shadowed(directory: Path, server: Upstream, rules: Sequence[RuleConfig] = (), *, shadow: bool = True, **more: Any) -> Gateway:
    return Gateway(directory, upstream_config(server.port), config={"rules": tuple(rules), "shadow": shadow},
                   **({"cards": (BOB, CAROL)} | more))


async def summary(gateway: Gateway) -> Summary:
    return summarise(await gateway.store.recent_outcomes(1000))


async def test_everything_passes_byte_for_byte_below_our_received_line(tmp_path: Path) -> None:
    """What would be sealed, refused at RCPT, refused at DATA, or is no mail at all; Bcc, controls and tags stay too."""
    messages = {
        "sealed": ([BOB.address], b"Bcc: x@else.example\r\nMalote-Seal: yes\r\n" + text()),
        "refused at RCPT": ([STRANGER], text(to=STRANGER, message_id="")),
        "mixed": ([BOB.address, STRANGER], text(cc=STRANGER)),
        "a route": (["bob%test.example@relay.example"], text()),
        "two authors": ([BOB.address], text("a@test.example, b@test.example", message_id="<2@test.example>")),
        "no author": ([BOB.address], text("", message_id="<3@test.example>")),
        "no such control": ([BOB.address], text(malote_seal="perhaps")),
        "no identity": ([BOB.address], text("nobody@test.example")),
        "8 bit": ([BOB.address], text(body="Gr\u00fc\u00dfe\r\n.dot\r\n" + "x" * 2000)),
        "no header": ([BOB.address], b"\r\nonly text\r\n"),
    }
    async with Upstream() as upstream, shadowed(tmp_path, upstream, [REQUIRE]) as gw:
        for name, (recipients, content) in messages.items():
            before = len(upstream.messages)
            done = await gw.submit(ALICE.address, recipients, content, mail=["BODY=8BITMIME", "RET=FULL", "ENVID=E1"])
            assert done.code == 250, (name, done)
            [message] = upstream.messages[before:]
            assert message.recipients == recipients, name
            trace, _, rest = message.content.partition(b" +0000\r\n")
            assert trace.startswith(b"Received: by gateway.test.example (malote) with ESMTP;\r\n "), name
            assert rest == content, name
            for parameter in ("BODY=8BITMIME", "RET=FULL", "ENVID=E1"):
                assert parameter in message.mail, "and so do its parameters"
    assert len(upstream.messages) == len(messages)


async def test_what_would_have_been_done_is_summed_up_by_rule_reason_and_domain(tmp_path: Path) -> None:
    rules = [RuleConfig(recipients=("@never.example",), seal="never"),
             RuleConfig(recipients=("@strict.example", "@test.example"), seal="require"),
             RuleConfig(recipients=("@forbidden.example",), seal="refuse")]
    async with Upstream() as upstream, shadowed(tmp_path, upstream, rules) as gw:
        for number, recipients in enumerate((
                [BOB.address, CAROL.address], ["a@strict.example", "b@strict.example"], ["x@never.example"],
                ["y@forbidden.example"], [STRANGER], [BOB.address, STRANGER])):
            content = text(to=", ".join(recipients), message_id=f"<{number}@test.example>")
            assert (await gw.submit(ALICE.address, recipients, content)).code == 250
        told = await summary(gw)
        lines = await gw.store.recent_outcomes(1000)
    assert told.messages == 6
    assert told.actions == {"seal": 2, "refuse": 5, "plain": 2}
    assert told.rules == {
        "1": {"plain": 1}, "2": {"seal": 2, "refuse": 3}, "3": {"refuse": 1}, "default": {"plain": 1, "refuse": 1}}
    assert told.reasons == {
        "seal": {"there is a card": 2}, "plain": {"not to be sealed": 1, "no card": 1},
        "refuse": {"no card": 2, "a rule forbids it": 1, "because of other recipients": 2}}
    assert told.domains == {"strict.example": 2, "else.example": 1}
    assert [line.outcome for line in lines if line.direction == "out"] == ["shadow"] * 6
    written = " ".join(str(dataclasses.astuple(line)) for line in lines if line.direction == "shadow")
    assert "@" not in written, "domains only, and those only where a card is missing"
    assert "test.example" not in written
    assert "secret" not in written


async def test_the_log_has_counts_and_nothing_private(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with Upstream() as upstream, shadowed(tmp_path, upstream, [REQUIRE]) as gw:
            await gw.submit(ALICE.address, [BOB.address, STRANGER], text(cc=STRANGER))
    [line] = [line for line in logs if line["event"] == "shadow"]
    assert (line["would_seal"], line["would_pass"], line["would_refuse"], line["rules"]) == (1, 0, 1, [1])
    assert not any(word in str(line) for word in ("example", "secret", "@"))


async def test_a_retry_is_served_once_here_too(tmp_path: Path) -> None:
    def script(step: str, _argument: str, number: int) -> str | bool:
        return "451 4.3.0 later" if step == "DOT" and number == 1 else False
    async with Upstream(script) as upstream, shadowed(tmp_path, upstream, [REQUIRE]) as gw:
        content = text(to=STRANGER, date="", message_id="")
        assert (await gw.submit(ALICE.address, [STRANGER], content, polite=False)).code == 451
        for _ in range(3):
            assert (await gw.submit(ALICE.address, [STRANGER], content, polite=False)).code == 250
    assert len(upstream.messages) == 1


async def test_a_loop_is_cut_in_shadow_mode_too(tmp_path: Path) -> None:
    async with Upstream() as upstream, shadowed(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], b"Received: by x; Mon, 23 Nov 2026 10:00:00 +0000\r\n" * 51 + text())
    assert done.data.startswith("554 5.4.6")
    assert upstream.messages == []


async def test_what_goes_wrong_in_judging_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("the inside")
    monkeypatch.setattr(Decider, "decide", broken)
    async with Upstream() as upstream, shadowed(tmp_path, upstream, [REQUIRE]) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
    assert upstream.messages[0].content.endswith(text())


async def test_switched_off_while_a_connection_is_open_it_is_enforced_at_once(tmp_path: Path) -> None:
    """The recipients were taken in shadow mode; at DATA the rules are in force: nothing leaves plain."""
    async with Upstream() as upstream, shadowed(tmp_path, upstream, [REQUIRE]) as gw:
        real = gw.desk.data

        async def data(*arguments: Any) -> Any:
            gw.submissions.decider.policy = Policy(OutgoingConfig(rules=(REQUIRE,)))
            return await real(*arguments)
        gw.desk.data = data  # type: ignore[method-assign]
        content = text(cc=STRANGER)
        assert (await gw.submit(ALICE.address, [BOB.address, STRANGER], content)).data.startswith("550 5.7.1 No key for stranger")
        assert (await gw.submit(ALICE.address, [BOB.address], content)).code == 250
    [message] = upstream.messages
    assert opened(message.content, BOB, ALICE).original == content
    assert b"secret" not in upstream.wire


# ---- one rule on trial

async def test_a_rule_on_trial_changes_nothing_and_what_it_would_is_written_down(tmp_path: Path) -> None:
    rules = [RuleConfig(recipients=("@else.example",), seal="require", shadow=True),
             RuleConfig(recipients=("@test.example",), seal="never", shadow=True)]
    async with Upstream() as upstream, shadowed(tmp_path, upstream, rules, shadow=False) as gw:
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))).code == 250
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        assert (await gw.submit(ALICE.address, ["z@third.example"], text(to="z@third.example"))).code == 250
        told = await summary(gw)
    plain, sealed, _ = upstream.messages
    assert plain.content.endswith(text(to=STRANGER))
    assert opened(sealed.content, BOB, ALICE).original == text(), "a weaker rule on trial lets nothing leave plain"
    assert told.rules == {"1": {"refuse": 1}, "2": {"plain": 1}}
    assert told.domains == {"else.example": 1}


async def test_a_rule_on_trial_never_weakens_the_rule_below_it(tmp_path: Path) -> None:
    """`refuse` on trial by subject, above a `require` that is in force: still required."""
    rules = [RuleConfig(subjects=("*secret*",), seal="refuse", shadow=True), REQUIRE]
    async with Upstream() as upstream, shadowed(tmp_path, upstream, rules, shadow=False) as gw:
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))).code == 550
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        told = await summary(gw)
    assert b"secret" not in upstream.wire
    assert told.reasons == {"refuse": {"a rule forbids it": 1}}


# ---- loud

def test_it_is_said_loudly_and_not_combined_in_silence() -> None:
    config = OutgoingConfig(shadow=True, rules=(RuleConfig(), REQUIRE))
    assert shadow_warnings(config) == [
        "outgoing.shadow is true: NOTHING IS SEALED, all mail leaves as it came, also under rules 2, which say require or refuse"]
    trial = OutgoingConfig(rules=(RuleConfig(shadow=True),))
    assert shadow_warnings(trial) == ["rules 1 are on trial (shadow): mail leaves as if they were not there"]
    assert shadow_warnings(OutgoingConfig()) == []
    both = OutgoingConfig(shadow=True, rules=(RuleConfig(shadow=True),))
    assert any("outgoing.rules.1.shadow" in fault for fault in rule_faults(both))


async def test_explain_tells_what_would_be_and_that_it_is_not_obeyed(tmp_path: Path) -> None:
    async with Upstream() as upstream, shadowed(tmp_path, upstream) as gw:
        rules = (RuleConfig(recipients=("@else.example",), seal="require"),)
        config = Config(outgoing={"rules": rules, "shadow": True})
        told = await explain(gw.store, config, ALICE.address, [STRANGER], None)
        assert told.shadow
        assert told.refusal.startswith("550 5.7.1 No key for stranger@else.example")
        on_trial = (rules[0].model_copy(update={"shadow": True}),)
        told = await explain(gw.store, Config(outgoing={"rules": on_trial}), ALICE.address, [STRANGER], None)
        assert [answer.action for answer in told.recipients] == ["plain"]
        assert [(answer.recipient, answer.action, answer.rule) for answer in told.trial] == [(STRANGER, "refuse", 1)]
