"""Who gets a message sealed, who clear, who not at all: the administrator's table and what is joined to it.

The first rule without conditions on the content that speaks of a recipient gives a floor and a ceiling; rules with such
conditions before it only raise them. What the user asks for, a reply to sealed mail and the history of the card are joined (the
stronger counts), then capped by the ceiling; only `seal = "never"`, or `allow_no` together with the user's no, make the ceiling
lower than `require`. After the last rule stands the default row: `prefer`. Pure: `decide_*` returns, `check_*` raises.

`decide_message` is the whole decision in one call, for the proxy and for whoever wants to explain it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from malote.config import Level, OutgoingConfig
from malote.core.content import NO_CONTENT, Content
from malote.core.rules import DEFAULT_ROW, Row, Table
from malote.core.tags import make_tag
from malote.errors import KeyMissing, MaloteError, PolicyRefused, Reply, SenderRefused

if TYPE_CHECKING:
    from malote.core.encrypted import Encrypted
    from malote.core.message import Control

DEFAULT_CONFIG = OutgoingConfig()
MAX_NAMED = 10      # recipients that a refusal names; the rest is counted, so that the reply stays one that clients show

_STRENGTH = {Level.NEVER: 0, Level.PREFER: 1, Level.REQUIRE: 2, Level.REFUSE: 3}


class Action(StrEnum):
    SEAL = "seal"
    PLAIN = "plain"         # leaves as it is: clear, or encrypted already (`Decision.covered`)
    REFUSE = "refuse"


class Missing(StrEnum):
    """Why a recipient is refused."""

    NOTHING = ""
    CARD = "card"
    IDENTITY = "identity"
    PERMISSION = "permission"       # a rule says so
    PART = "part"                   # of those whom the message that this answers was for, he is none


class Why(StrEnum):
    """What asks for `require`, whatever the rules say."""

    CARD = "card"           # there is one
    HISTORY = "history"     # there was one
    REPLY = "reply"         # it answers sealed mail
    USER = "user"           # Malote-Seal: yes, or the tag


@dataclass(frozen=True, slots=True)
class MessageFacts:
    """What is known of a message, for all its recipients. The defaults are those of RCPT, before there is any content."""

    sender: str                     # canonical, from From; at RCPT that of the envelope stands in for it
    identity: bool = True           # there is one for it: what cannot be signed is never sealed
    control: Control | None = None  # Malote-Seal, or a tag in the subject
    reply: bool = False             # In-Reply-To or References name a message that was sealed (RFC 9787 5.4)
    encrypted: Encrypted = "no"     # what the root test of `core.encrypted` says of the whole message
    content: Content = NO_CONTENT   # what `Table.wanted` asks for


@dataclass(frozen=True, slots=True)
class RecipientFacts:
    address: str            # canonical
    card: bool              # a usable one is held
    had_card: bool          # one is or ever was
    outsider: bool = False  # the message answers one that was opened here, and he was no part of that (RFC 9788 6.2)


@dataclass(frozen=True, slots=True)
class Decision:
    recipient: str
    action: Action
    level: Level
    rule: int | None            # index in the table of the rule that decided; None: the default row
    reason: str                 # for the log and the reply: which rule, what is missing, the way out
    mixed: Literal["refuse", "split"]
    accept_encrypted: bool
    list: bool
    covered: bool = False       # PLAIN, and what leaves is encrypted already: not clear
    missing: Missing = Missing.NOTHING
    floor: Level = Level.PREFER         # of the rules alone
    ceiling: Level = Level.REQUIRE
    rules: tuple[int, ...] = ()         # every rule that had a say, in order; the last is the one without conditions
    why: tuple[Why, ...] = ()           # what was joined to them

    @property
    def clear(self) -> bool:
        """Whether this recipient gets the text readable for everybody on the way."""
        return self.action is Action.PLAIN and not self.covered


@dataclass(frozen=True, slots=True)
class MessageDecision:
    """What becomes of a message: `refusal`, else `decisions`, of which those to REFUSE are left out and reported."""

    decisions: tuple[Decision, ...]
    refusal: MaloteError | None = None

    @property
    def left_out(self) -> tuple[Decision, ...]:
        return () if self.refusal else tuple(each for each in self.decisions if each.action is Action.REFUSE)

    def check(self) -> None:
        """Raises the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal


class Policy:
    """The table of one configuration, ready to be asked. Raises `FormatError` for a table with faults (`rules.rule_faults`)."""

    def __init__(self, config: OutgoingConfig = DEFAULT_CONFIG, *, trial: bool = False) -> None:
        """`trial`: with the rules that have `shadow`."""
        self.table = Table(config.rules, config.domains, trial=trial)
        self.shadow = config.shadow     # asked all the same, and not obeyed
        self.trial = None if trial or not any(rule.shadow for rule in config.rules) else Policy(config, trial=True)
        self.tags = (make_tag(config.seal_tag), make_tag(config.clear_tag))
        self._tag = config.seal_tag
        self._alone: dict[int, Bounds] = {}     # of rules without others beside them

    def decide_message(self, message: MessageFacts, recipients: Iterable[RecipientFacts]) -> MessageDecision:
        """What happens for each recipient, and whether the message is refused as a whole."""
        met: dict[int, bool] = {}
        decisions = tuple(self._decide(message, recipient, met) for recipient in recipients)
        return MessageDecision(decisions, decide_refusal(decisions))

    def decide_recipient(self, message: MessageFacts, recipient: RecipientFacts) -> Decision:
        """What happens for one recipient."""
        return self._decide(message, recipient, {})

    def decide_envelope(self, recipient: RecipientFacts, sender: str) -> Decision | None:
        """The refusal that RCPT already gets, as no content could change it: but for our own format, which only a rule with
        `accept_encrypted` lets pass where there is no card. None: wait for the content. `sender` is for the text only."""
        row = self.table.envelope_row(recipient.address)
        if row is None or row.rule.allow_no or row.rule.accept_encrypted or (recipient.card and self.table.asks_sender):
            return None
        decision = self._join(MessageFacts(sender), recipient, _bounds((row,), asked_no=False))
        return decision if decision.action is Action.REFUSE else None

    def _decide(self, message: MessageFacts, recipient: RecipientFacts, met: dict[int, bool]) -> Decision:
        """`met`: of the rules with conditions, which this message meets; filled as they are asked."""
        asked_no = message.control == "no"
        if self.table.empty and not asked_no:
            return self._join(message, recipient, _NO_RULES)
        if not self.table.asks_content and not asked_no:
            [row] = self.table.walk(message.sender, recipient.address)
            bounds = self._alone.get(row.index)
            if bounds is None:
                bounds = self._alone[row.index] = _bounds((row,), asked_no=False)
            return self._join(message, recipient, bounds)
        rows: list[Row] = []
        for row in self.table.walk(message.sender, recipient.address):
            if row.conditions is not None:
                if row.index not in met:
                    met[row.index] = row.conditions.met(message.content)
                if not met[row.index]:
                    continue
                if row.rule.seal is Level.NEVER:    # what is in a message speaks as its author does, and more softly
                    asked_no = asked_no or (message.control is None and not message.reply)
                    continue
            rows.append(row)
        return self._join(message, recipient, _bounds(tuple(rows), asked_no=asked_no))

    def _join(self, message: MessageFacts, recipient: RecipientFacts, bounds: Bounds) -> Decision:
        why = _why(message, recipient)
        level = _min(_max(bounds.floor, Level.REQUIRE) if why else bounds.floor, bounds.ceiling)
        obeyed = message.control == "yes" or (message.control == "no" and level is Level.NEVER)
        missing, covered, action = Missing.NOTHING, False, Action.REFUSE
        if level is Level.REFUSE:
            missing, reason = Missing.PERMISSION, _forbidden(recipient.address, bounds.decisive)
        elif recipient.outsider and not obeyed and message.encrypted != "malote":
            missing, reason = Missing.PART, _outside(recipient.address, self._tag)
        else:
            possible = recipient.card and message.identity
            action, covered, reason = _decide_action(level, possible, message.encrypted, bounds.accept_encrypted)
            if action is Action.REFUSE:
                missing = Missing.IDENTITY if recipient.card else Missing.CARD
                reason = _missing_text(missing, message.sender, recipient.address, why, bounds.floor)
        if action is not Action.REFUSE:
            name = "default rule" if bounds.decisive is None else f"rule {bounds.decisive + 1}"
            reason += f" ({name}: {level})"
        return Decision(
            recipient.address, action, level, bounds.decisive, reason, bounds.mixed, bounds.accept_encrypted, bounds.list,
            covered, missing, bounds.floor, bounds.ceiling, bounds.rules, why)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the rules say of one recipient, before anything is joined."""

    floor: Level
    ceiling: Level
    decisive: int | None        # index of the rule whose floor it is; None: the default row
    rules: tuple[int, ...]
    mixed: Literal["refuse", "split"]
    accept_encrypted: bool
    list: bool


def _bounds(rows: Sequence[Row], *, asked_no: bool) -> Bounds:
    """Of several rules the strictest counts in each point. The last is the one without conditions."""
    rules = [row.rule for row in rows]
    floor = max((rule.seal for rule in rules), key=_STRENGTH.__getitem__)
    if floor is Level.REFUSE:
        ceiling = Level.REFUSE
    elif floor is Level.NEVER or (asked_no and all(rule.allow_no or rule.seal is Level.NEVER for rule in rules)):
        ceiling = Level.NEVER
    else:
        ceiling = Level.REQUIRE
    decisive = next(row.index for row in rows if row.rule.seal is floor)
    return Bounds(
        floor, ceiling, decisive if decisive >= 0 else None, tuple(row.index for row in rows if row.index >= 0),
        "split" if all(rule.mixed == "split" for rule in rules) else "refuse",
        all(rule.accept_encrypted for rule in rules), rules[-1].list)


_NO_RULES = _bounds((DEFAULT_ROW,), asked_no=False)


def _why(message: MessageFacts, recipient: RecipientFacts) -> tuple[Why, ...]:
    """What asks for `require`; nobody and nothing asks for less."""
    if not message.reply and message.control != "yes":      # at RCPT, and mostly
        return _CARD if recipient.card else _HISTORY if recipient.had_card else ()
    asked = {Why.CARD: recipient.card, Why.HISTORY: recipient.had_card and not recipient.card,
             Why.REPLY: message.reply, Why.USER: message.control == "yes"}
    return tuple(why for why, asks in asked.items() if asks)


_CARD, _HISTORY = (Why.CARD,), (Why.HISTORY,)


def _decide_action(level: Level, possible: bool, encrypted: Encrypted, accept_encrypted: bool) -> tuple[Action, bool, str]:
    """What is done, whether it is encrypted already, and why. `possible`: there are a card and an identity."""
    if encrypted == "malote":
        return Action.PLAIN, True, "sealed already"
    covered = encrypted != "no"
    if level is Level.NEVER:
        return Action.PLAIN, covered, "not to be sealed"
    if covered and accept_encrypted:
        return Action.PLAIN, True, "encrypted already, which the rule accepts"
    if possible:
        return Action.SEAL, False, "has a card"
    if level is Level.PREFER:
        return Action.PLAIN, covered, "no card"
    return Action.REFUSE, False, ""


def let_pass(recipient: str) -> Decision:
    """In shadow mode (`outgoing.shadow`): it leaves as it came, whatever the rules say."""
    return Decision(recipient, Action.PLAIN, Level.NEVER, None, "shadow mode, nothing is enforced", "split", False, False,
                    floor=Level.NEVER, ceiling=Level.NEVER)


# ---- what a refusal says: who, what is missing, that nothing was sent, and the way out


def _missing_text(missing: Missing, sender: str, recipient: str, why: Sequence[Why], floor: Level) -> str:
    only_reply = why == (Why.REPLY,) and floor is not Level.REQUIRE
    start = "This answers sealed mail, but there is no" if only_reply else "No"
    if missing is Missing.IDENTITY:
        return (f"{start} identity for {_shown(sender)} to sign with, and mail to {_shown(recipient)} must be sealed; "
                f"nothing was sent. `malote keys new {_shown(sender)}` makes one")
    if Why.HISTORY in why:
        return (f"No key for {_shown(recipient)} that is still good, and mail to them was sealed before; nothing was sent. "
                "Ask them for their new card and `malote keys import` it")
    return f"{start} key for {_shown(recipient)}; nothing was sent. Ask them for their card and `malote keys import` it"


def _forbidden(recipient: str, rule: int | None) -> str:
    return (f"Rule {(rule or 0) + 1} forbids this mail to {_shown(recipient)}; nothing was sent. "
            "Whoever runs this mail server can change the rule")


def _outside(recipient: str, tag: str) -> str:
    way = f"{tag} in the subject" if tag else "the header Malote-Seal: yes"
    return (f"This answers sealed mail that {_shown(recipient)} had no part in; nothing was sent. "
            f"Write to them separately, or add {way} to send it to them sealed all the same")


def decide_refusal(decisions: Sequence[Decision]) -> MaloteError | None:
    """Why the whole message is refused, if it is: somebody may not get it, or one gets it sealed and another clear.

    Not where the rules of all concerned say `mixed = "split"`: those of the ones who would be left out, and those of the ones
    who would get it clear, as it is there that the text leaves.
    """
    refused = [decision for decision in decisions if decision.action is Action.REFUSE]
    if refused and (len(refused) == len(decisions) or any(decision.mixed != "split" for decision in refused)):
        return refusal_of(refused)
    sealed = [decision.recipient for decision in decisions if decision.action is Action.SEAL]
    clear = [decision.recipient for decision in decisions if decision.clear and decision.mixed != "split"]
    if sealed and clear:
        text = (f"Sealed for {named(sealed)}, but clear for {named(clear)}; nothing was sent. Send two messages, "
                "or import the missing cards")
        return PolicyRefused(text, reply=Reply(550, "5.7.1", text))
    return None


def refusal_of(refused: Sequence[Decision]) -> MaloteError:
    """The error for these refused decisions. One: its own text. Several: all who lack the same as the first, by name."""
    first = refused[0]
    kind: type[MaloteError] = _KINDS[first.missing]
    names = named([decision.recipient for decision in refused if decision.missing is first.missing])
    match first.missing if len(refused) > 1 else Missing.NOTHING:
        case Missing.CARD:
            text = f"No key for {names}; nothing was sent. Ask them for their cards and `malote keys import` them"
        case Missing.PART:
            text = first.reason.replace(_shown(first.recipient), names, 1)
        case _:
            text = first.reason
    return kind(text, reply=Reply(550, "5.7.1", text))


_KINDS: dict[Missing, type[MaloteError]] = {
    Missing.CARD: KeyMissing, Missing.IDENTITY: SenderRefused, Missing.PERMISSION: PolicyRefused, Missing.PART: PolicyRefused,
}


def left_out_reply(decision: Decision) -> Reply:
    """What is reported of a recipient who is left out while others get the message."""
    return Reply(550, "5.7.1", decision.reason.replace("; nothing was sent.", "; not sent to them.", 1))


def _max(one: Level, other: Level) -> Level:
    return max(one, other, key=_STRENGTH.__getitem__)


def _min(one: Level, other: Level) -> Level:
    return min(one, other, key=_STRENGTH.__getitem__)


def named(recipients: Sequence[str]) -> str:
    names = ", ".join(_shown(recipient) for recipient in recipients[:MAX_NAMED])
    more = len(recipients) - MAX_NAMED
    return f"{names} and {more} more" if more > 0 else names


def _shown(address: str) -> str:
    """ASCII, as an SMTP reply must be where the client did not ask for SMTPUTF8 (RFC 6531 3.7.4)."""
    return address.encode("ascii", "backslashreplace").decode("ascii")
