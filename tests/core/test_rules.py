"""Patterns name whom they should and nobody else, faults are found before the table is used, and a long table is not walked."""

from __future__ import annotations

import pytest

from malote.config import OutgoingConfig, RuleConfig
from malote.core import rules as core_rules
from malote.core.rules import Table, keys_of, rule_faults
from malote.errors import FormatError

BOB = "bob@b.example"


def found(table: Table, recipient: str, sender: str = "alice@a.example") -> list[int]:
    return [row.index for row in table.walk(sender, recipient)]


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
    ("@b\u00fccher.example", "bob@xn--bcher-kva.example", True),
    ("@*.b\u00fccher.example", "bob@a.xn--bcher-kva.example", True),
])
def test_patterns(pattern: str, recipient: str, matches: bool) -> None:
    """A rule meets its recipients (and senders) however it is spelled, and nobody else."""
    for key in ("recipients", "senders"):
        table = Table([RuleConfig(**{key: ("x@y.example", pattern)})])
        who = {"recipient": recipient} if key == "recipients" else {"recipient": BOB, "sender": recipient}
        assert found(table, **who) == ([0] if matches else [-1])


def test_a_table_of_ten_thousand_patterns_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pattern is read once, when the rules load; a recipient then costs as many look-ups as its domain has labels, however
    the patterns are spread over rules, and only rules that may speak of him are looked at."""
    parsed = 0
    real = core_rules.parse_pattern

    def counting(text: str) -> str:
        nonlocal parsed
        parsed += 1
        return real(text)
    monkeypatch.setattr(core_rules, "parse_pattern", counting)
    many = [RuleConfig(recipients=(f"user{n}@d{n}.example", f"@e{n}.example"), seal="require") for n in range(4000)]
    many += [RuleConfig(senders=(f"user{n}@s{n}.example",), seal="require") for n in range(2000)]
    table = Table([RuleConfig(recipients=tuple(f"@*.f{n}.example" for n in range(10_000))), *many, RuleConfig()])
    loaded = parsed
    assert loaded >= 20_000
    looked_at: list[int] = []
    rows = table._rows

    class Watched(list[core_rules.Row]):
        def __getitem__(self, index: int) -> core_rules.Row:    # type: ignore[override]
            looked_at.append(index)
            return super().__getitem__(index)
    table._rows = Watched(rows)
    for recipient, rule in (("user3999@d3999.example", 4000), ("x@e17.example", 18), ("x@a.f9999.example", 0),
                            ("x@g.example", 6001)):
        looked_at.clear()
        assert found(table, recipient) == [rule]
        assert len(looked_at) <= 2
        envelope = table.envelope_row(recipient)
        assert envelope is not None
        assert envelope.index == rule
    looked_at.clear()
    assert found(table, "x@g.example", "user1999@s1999.example") == [6000]
    assert len(looked_at) == 1
    assert parsed == loaded
    assert keys_of("a@b.c.example") == ["a@b.c.example", "@b.c.example", "@*.c.example", "@*.example"]


def faults(*rules: RuleConfig, **more: object) -> list[str]:
    return rule_faults(OutgoingConfig.model_validate({"rules": rules, **more}))


def test_rules_are_checked_before_use() -> None:
    """A pattern that matches nobody because of its spelling would leave the default in force: every fault is named."""
    good = ("*", "@b.example", "@*.b.example", BOB)
    assert faults(RuleConfig(recipients=good, senders=good, headers=("X-A", "X-B: *c*"), direction="inbound"),
                  domains=("b.example", "*.b.example"), seal_tag="[seal]", clear_tag="[clear]") == []
    bad = [RuleConfig(recipients=each) for each in (("*@b.example", BOB), ("b.example", "@", "@*"), ())]
    assert [line.split(" names ")[0] for line in faults(*bad)] == [
        "outgoing.rules.1.recipients: '*@b.example'", "outgoing.rules.2.recipients: 'b.example'",
        "outgoing.rules.2.recipients: '@'", "outgoing.rules.2.recipients: '@*'", "outgoing.rules.3.recipients:",
    ]
    with pytest.raises(FormatError):
        Table(bad)


@pytest.mark.parametrize(("rule", "more", "fault"), [
    ({"senders": ("a.example",)}, {}, "rules.1.senders: 'a.example' names nobody"),
    ({"headers": ("Two Words: x",)}, {}, "rules.1.headers: 'Two Words: x' is no header field"),
    ({"headers": ("",)}, {}, "rules.1.headers: '' is no header field"),
    ({"direction": "internal"}, {}, "rules.1.direction: needs outgoing.domains"),
    ({"seal": "refuse", "allow_no": True}, {}, "rules.1.seal: "),
    ({"subjects": ("",)}, {}, "rules.1.subjects: "),
    ({}, {"domains": ("@b.example",)}, "domains.1: '@b.example' is no domain"),
    ({}, {"domains": ("b.example", "b..example")}, "domains.2: "),
    ({}, {"seal_tag": "[a b]"}, "seal_tag: must be 3 to 40 visible"),
    ({}, {"clear_tag": "x"}, "clear_tag: must be"),
    ({}, {"clear_tag": "[Seal]", "seal_tag": "[seal]"}, "clear_tag: and seal_tag must not"),
])
def test_what_a_rule_cannot_mean_is_a_fault(rule: dict[str, object], more: dict[str, object], fault: str) -> None:
    [said] = faults(RuleConfig.model_validate(rule), **more)
    assert said.startswith(f"outgoing.{fault}")
