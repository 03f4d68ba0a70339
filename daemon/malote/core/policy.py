"""Who gets a message sealed, who clear, who not at all: the administrator's table and what is joined to it.

The first rule that matches a recipient gives a floor and a ceiling. What the user asks for, a reply to sealed mail and the
history of the card are joined (the stronger counts), then capped by the ceiling; only `seal = "never"`, or `allow_no` together
with the user's no, make the ceiling lower than `require`. After the last rule stands the default row: `prefer`. Pure:
`decide_*` returns, `check_*` raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from malote.config import Level, RuleConfig
from malote.core.address import canonical_address, canonical_domain, domain_of
from malote.errors import FormatError, KeyMissing, MaloteError, PolicyRefused, Reply, SenderRefused

if TYPE_CHECKING:
    from malote.core.encrypted import Encrypted
    from malote.core.message import Control

DEFAULT_RULE = RuleConfig()
MAX_NAMED = 10      # recipients that a refusal names; the rest is counted, so that the reply stays one that clients show

_STRENGTH = {Level.NEVER: 0, Level.PREFER: 1, Level.REQUIRE: 2}
_Kind = Literal["all", "domain", "subdomains", "address"]


class Action(StrEnum):
    SEAL = "seal"
    PLAIN = "plain"         # leaves as it is: clear, or encrypted already (`Decision.covered`)
    REFUSE = "refuse"


class Missing(StrEnum):
    """Why a recipient is refused."""

    NOTHING = ""
    CARD = "card"
    IDENTITY = "identity"


@dataclass(frozen=True, slots=True)
class Decision:
    recipient: str
    action: Action
    level: Level
    rule: int | None            # index in the table; None: the default row
    reason: str                 # for the log and the reply: which rule, what is missing, the way out
    mixed: Literal["refuse", "split"]
    accept_encrypted: bool
    list: bool
    covered: bool = False       # PLAIN, and what leaves is encrypted already: not clear
    missing: Missing = Missing.NOTHING

    @property
    def clear(self) -> bool:
        """Whether this recipient gets the text readable for everybody on the way."""
        return self.action is Action.PLAIN and not self.covered


def decide_recipient(
    rules: Sequence[RuleConfig], sender: str, recipient: str, *, card: bool, had_card: bool,
    control: Control | None = None, reply: bool = False, encrypted: Encrypted = "no", identity: bool = True,
) -> Decision:
    """What happens for one recipient (canonical address).

    `card`: a usable card is held; `had_card`: one is or ever was. `identity`: there is one for `sender` (canonical, from From):
    what cannot be signed is never sealed. `reply`: In-Reply-To or References name a message that was sealed (RFC 9787 5.4: what
    it quotes must not leave in clear). `encrypted`: what the root test of `core.encrypted` says of the whole message.
    """
    index, rule = find_rule(rules, recipient)
    level = decide_level(rule, card=card, had_card=had_card, control=control, reply=reply)
    action, covered, reason = _decide_action(rule, level, card and identity, encrypted)
    missing = Missing.NOTHING
    if action is Action.REFUSE:
        missing = Missing.IDENTITY if card else Missing.CARD
        reason = _refusal(missing, sender, recipient, only_reply=reply and rule.seal is not Level.REQUIRE and not had_card)
    else:
        reason += f" (rule {index + 1}: {level})" if index is not None else f" (default rule: {level})"
    return Decision(
        recipient, action, level, index, reason, rule.mixed, rule.accept_encrypted, rule.list, covered, missing,
    )


def decide_level(rule: RuleConfig, *, card: bool, had_card: bool, control: Control | None, reply: bool = False) -> Level:
    """The joined and capped level: the rule's own is the floor, as joining only adds; never above `ceiling_of(rule, control)`."""
    joined = _max(rule.seal, Level.REQUIRE if card or had_card or reply or control == "yes" else Level.NEVER)
    return _min(joined, ceiling_of(rule, control))


def ceiling_of(rule: RuleConfig, control: Control | None) -> Level:
    if rule.seal is Level.NEVER or (rule.allow_no and control == "no"):
        return Level.NEVER
    return Level.REQUIRE


def decide_envelope(
    rules: Sequence[RuleConfig], sender: str, recipient: str, *, card: bool, had_card: bool,
) -> Decision | None:
    """The refusal that RCPT already gets, as no content could change it: but for our own format, which only a rule with
    `accept_encrypted` lets pass where there is no card. None: wait for the content."""
    decision = decide_recipient(rules, sender, recipient, card=card, had_card=had_card)
    if decision.action is not Action.REFUSE:
        return None
    _, rule = find_rule(rules, recipient)
    return None if rule.allow_no or rule.accept_encrypted else decision


def _decide_action(rule: RuleConfig, level: Level, possible: bool, encrypted: Encrypted) -> tuple[Action, bool, str]:
    """What is done, whether it is encrypted already, and why. `possible`: there are a card and an identity."""
    if encrypted == "malote":
        return Action.PLAIN, True, "sealed already"
    covered = encrypted != "no"
    if level is Level.NEVER:
        return Action.PLAIN, covered, "not to be sealed"
    if covered and rule.accept_encrypted:
        return Action.PLAIN, True, "encrypted already, which the rule accepts"
    if possible:
        return Action.SEAL, False, "has a card"
    if level is Level.PREFER:
        return Action.PLAIN, covered, "no card"
    return Action.REFUSE, False, ""


def _refusal(missing: Missing, sender: str, recipient: str, *, only_reply: bool) -> str:
    """What is missing, that nothing was sent, and the way out."""
    why = "This answers sealed mail, but there is no" if only_reply else "No"
    if missing is Missing.CARD:
        return f"{why} key for {_shown(recipient)}; nothing was sent. Ask them for their card and `malote keys import` it"
    return (
        f"{why} identity for {_shown(sender)} to sign with, and mail to {_shown(recipient)} must be sealed; nothing was sent. "
        f"`malote keys new {_shown(sender)}` makes one"
    )


def check_recipients(decisions: Iterable[Decision]) -> None:
    """Raises `KeyMissing` or `SenderRefused` that names every recipient that is refused, and the way out."""
    refused = [decision for decision in decisions if decision.action is Action.REFUSE]
    if refused:
        raise refusal_of(refused)


def refusal_of(refused: Sequence[Decision]) -> MaloteError:
    """The error for these refused decisions. One: its own text. Several: all who lack the same thing, by name."""
    first = refused[0]
    kind = SenderRefused if first.missing is Missing.IDENTITY else KeyMissing
    if len(refused) == 1 or first.missing is Missing.IDENTITY:
        text = first.reason
    else:
        names = _named([decision.recipient for decision in refused])
        text = f"No key for {names}; nothing was sent. Ask them for their cards and `malote keys import` them"
    return kind(text, reply=Reply(550, "5.7.1", text))


def check_mix(decisions: Iterable[Decision]) -> None:
    """Raises `PolicyRefused` when one recipient would get the message sealed and another clear.

    The rule of every recipient that would get it clear must say `mixed = "split"`: it is there that the text leaves.
    """
    decisions = list(decisions)
    sealed = [decision.recipient for decision in decisions if decision.action is Action.SEAL]
    clear = [decision.recipient for decision in decisions if decision.clear and decision.mixed != "split"]
    if sealed and clear:
        text = (
            f"Sealed for {_named(sealed)}, but clear for {_named(clear)}; nothing was sent. Send two messages, "
            "or import the missing cards"
        )
        raise PolicyRefused(text, reply=Reply(550, "5.7.1", text))


def find_rule(rules: Sequence[RuleConfig], recipient: str) -> tuple[int | None, RuleConfig]:
    """The first rule that names this canonical address, with its index; else the default row."""
    domain = domain_of(recipient)
    for index, rule in enumerate(rules):
        for text in rule.recipients:
            kind, value = parse_pattern(text)
            if (
                kind == "all"
                or (kind == "domain" and domain == value)
                or (kind == "subdomains" and domain.endswith(value))
                or (kind == "address" and recipient == value)
            ):
                return index, rule
    return None, DEFAULT_RULE


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> tuple[_Kind, str]:
    """One entry of `recipients`, in canonical form. `@*.example.org` is every domain below, not example.org itself.

    Raises `FormatError`.
    """
    if text == "*":
        return "all", ""
    if text.startswith("@*."):
        return "subdomains", "." + canonical_domain(text[3:])
    if text.startswith("@"):
        return "domain", canonical_domain(text[1:])
    if "*" in text:
        raise FormatError("a pattern is *, @example.org, @*.example.org or anna@example.org")
    return "address", canonical_address(text)


def rule_faults(rules: Sequence[RuleConfig]) -> list[str]:
    """Every pattern that is none, as `key: what is wrong; the cure`: a rule must not be missed because of its spelling."""
    faults: list[str] = []
    for index, rule in enumerate(rules, 1):
        for text in rule.recipients:
            try:
                parse_pattern(text)
            except FormatError:
                faults.append(f"outgoing.rules.{index}.recipients: {text!r} names nobody; "
                              "write *, @example.org, @*.example.org or anna@example.org")
        if not rule.recipients:
            faults.append(f"outgoing.rules.{index}.recipients: names nobody, the rule is never used; remove it")
    return faults


def _max(one: Level, other: Level) -> Level:
    return max(one, other, key=_STRENGTH.__getitem__)


def _min(one: Level, other: Level) -> Level:
    return min(one, other, key=_STRENGTH.__getitem__)


def _named(recipients: Sequence[str]) -> str:
    names = ", ".join(_shown(recipient) for recipient in recipients[:MAX_NAMED])
    more = len(recipients) - MAX_NAMED
    return f"{names} and {more} more" if more > 0 else names


def _shown(address: str) -> str:
    """ASCII, as an SMTP reply must be where the client did not ask for SMTPUTF8 (RFC 6531 3.7.4)."""
    return address.encode("ascii", "backslashreplace").decode("ascii")
