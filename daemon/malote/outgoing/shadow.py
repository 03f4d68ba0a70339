"""Shadow mode: what the rules would do is decided and written down, and not done.

`outgoing.shadow`: all mail passes byte for byte as it came, below our Received line; logins, limits and the end of loops stay.
`shadow` of a rule: the table is obeyed without that rule, and what it would change is written down. Nothing that goes wrong
here stops a message. The log has counts, rules and reasons; the store also the domains that lack cards (`malote log --shadow`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import structlog

from malote.config import OutgoingConfig
from malote.core.address import domain_of
from malote.core.policy import Action, Decision, Missing
from malote.store.records import OutcomeEntry

log = structlog.get_logger("malote.outgoing")

DIRECTION = "shadow"            # of the lines in the store
_DEFAULT = "default"            # the row after the last rule


class Reason(StrEnum):
    CARD = "there is a card"
    NO_CARD = "no card"
    NEVER = "not to be sealed"
    COVERED = "encrypted already"
    NO_IDENTITY = "no identity for the sender"
    RULE = "a rule forbids it"
    OUTSIDER = "answers sealed mail to an outsider"
    OTHERS = "because of other recipients"
    SENDER = "the sender"
    NO_MAIL = "no mail"


_MISSING = {Missing.CARD: Reason.NO_CARD, Missing.IDENTITY: Reason.NO_IDENTITY, Missing.PERMISSION: Reason.RULE,
            Missing.PART: Reason.OUTSIDER}


@dataclass(frozen=True, slots=True)
class Would:
    """What would become of one recipient."""

    recipient: str
    action: Action
    rule: int | None
    reason: Reason

    @property
    def lacks_card(self) -> bool:
        return self.reason is Reason.NO_CARD


def would(recipient: str, decision: Decision | None, *, refusal: Reason | None = None) -> Would:
    """`refusal`: the whole message would be refused, with this reason for those who would not be otherwise."""
    if decision is None:
        return Would(recipient, Action.REFUSE, None, refusal or Reason.NO_MAIL)
    if decision.action is Action.REFUSE:
        return Would(recipient, Action.REFUSE, decision.rule, _MISSING.get(decision.missing, Reason.RULE))
    if refusal is not None:
        return Would(recipient, Action.REFUSE, decision.rule, refusal)
    reason = Reason.CARD
    if decision.action is Action.PLAIN:
        reason = Reason.COVERED if decision.covered else Reason.NEVER if decision.level == "never" else Reason.NO_CARD
    return Would(recipient, decision.action, decision.rule, reason)


def entries(judged: Iterable[Would], *, message_id: str, now_ms: int) -> list[OutcomeEntry]:
    """For the store: one line for each rule, action and reason; the domain only where a card is missing."""
    counts = Counter((each.action, each.rule, each.reason, domain_of(each.recipient) if each.lacks_card else "")
                     for each in judged)
    return [OutcomeEntry(at_ms=now_ms, direction=DIRECTION, outcome=f"would-{action}", account=domain, message_id=message_id,
                         recipients=count, verdict=_DEFAULT if rule is None else str(rule + 1), detail=reason)
            for (action, rule, reason, domain), count in counts.items()]


def tell(judged: Iterable[Would], *, message_id: str) -> None:
    """One line in the log, without any address or domain."""
    judged = list(judged)
    counts = Counter(each.action for each in judged)
    log.info("shadow", id=message_id, would_seal=counts[Action.SEAL], would_pass=counts[Action.PLAIN],
             would_refuse=counts[Action.REFUSE], reasons=dict(Counter(str(each.reason) for each in judged)),
             rules=sorted({each.rule + 1 for each in judged if each.rule is not None}))


@dataclass(frozen=True, slots=True)
class Summary:
    """What enforcement would have done, in recipients (`messages`: in messages)."""

    since_ms: int
    messages: int
    actions: Mapping[str, int]
    rules: Mapping[str, Mapping[str, int]]      # by number ("default": none), then action
    reasons: Mapping[str, Mapping[str, int]]    # by action, then reason
    domains: Mapping[str, int]                  # without a card, most first


def summarise(lines: Iterable[OutcomeEntry]) -> Summary:
    lines = [line for line in lines if line.direction == DIRECTION]
    actions: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    rules: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for line in lines:
        action = line.outcome.removeprefix("would-")
        actions[action] += line.recipients
        rules.setdefault(line.verdict, Counter())[action] += line.recipients
        reasons.setdefault(action, Counter())[line.detail] += line.recipients
        if line.account:
            domains[line.account] += line.recipients
    in_order = sorted(rules, key=lambda rule: (rule == _DEFAULT, rule.zfill(9)))
    return Summary(min((line.at_ms for line in lines), default=0), len({line.message_id for line in lines}), dict(actions),
                   {rule: dict(rules[rule]) for rule in in_order}, {action: dict(each) for action, each in reasons.items()},
                   dict(domains.most_common()))


def shadow_warnings(config: OutgoingConfig) -> list[str]:
    """What must not be overlooked, at each start and in `malote check`."""
    found = []
    if config.shadow:
        strict = [str(number) for number, rule in enumerate(config.rules, 1) if rule.seal in ("require", "refuse")]
        found.append("outgoing.shadow is true: NOTHING IS SEALED, all mail leaves as it came"
                     + (f", also under rules {', '.join(strict)}, which say require or refuse" if strict else ""))
    on_trial = [str(number) for number, rule in enumerate(config.rules, 1) if rule.shadow]
    if on_trial and not config.shadow:
        found.append(f"rules {', '.join(on_trial)} are on trial (shadow): mail leaves as if they were not there")
    return found
