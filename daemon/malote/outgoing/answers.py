"""What the client is told after DATA, decided from what became of each recipient. Pure.

250 is said only when the upstream server has accepted the message for everybody. A mix of temporary failures and successes is
451: the client comes again and the journal keeps those already served from getting it twice. A mix of success and final
refusal has no SMTP reply of its own: a person is told who got it and who did not (554); for a relay, whose client is a queue
that would bounce the whole, the sender gets a notification (notice.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from textwrap import wrap

from malote.errors import Reply

MAX_NAMED = 20          # addresses named in one reply; more would make a reply that no client shows
LINE_CHARACTERS = 400   # RFC 5321 4.5.3.1.5: a reply line has at most 512 octets


class State(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"         # 5xx: trying again does not help
    DEFERRED = "deferred"       # 4xx, or not sent at all: certainly not accepted
    IN_DOUBT = "in-doubt"       # the final dot left, the reply did not come


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one recipient, with the upstream server's reply (or ours where it gave none)."""

    state: State
    reply: Reply


@dataclass(frozen=True, slots=True)
class Answer:
    reply: Reply
    notify: tuple[str, ...] = ()    # recipients whose refusal must reach the sender by mail before the reply may be given
    settled: tuple[str, ...] = ()   # refused recipients for whom nothing is left to do once that was sent: a retry skips them


def outcome_of(reply: Reply) -> Outcome:
    """From the upstream server's final reply. What is neither 2xx nor 5xx counts as temporary."""
    kind = reply.code // 100
    return Outcome(State.ACCEPTED if kind == 2 else State.REFUSED if kind == 5 else State.DEFERRED, reply)


def decide_answer(outcomes: Mapping[str, Outcome], *, relay: bool, can_notify: bool,
                  silent: frozenset[str] = frozenset()) -> Answer:
    """`relay`: notify instead of naming in 554. `can_notify`: there is a sender to write to (not the null sender), and the
    message is no answer of a program. `silent`: recipients about whom the sender wants no notification (RFC 3461, NOTIFY)."""
    by_state: dict[State, list[str]] = {state: [] for state in State}
    for address, outcome in outcomes.items():
        by_state[outcome.state].append(address)
    accepted, refused = by_state[State.ACCEPTED], by_state[State.REFUSED]
    waiting = by_state[State.DEFERRED] + by_state[State.IN_DOUBT]
    if waiting:
        return Answer(_come_again(outcomes, accepted, waiting))
    if not refused:
        return Answer(_common(outcomes.values()) or Reply(250, "2.0.0", f"Accepted for {len(accepted)} recipients"))
    if not accepted:
        return Answer(_common(outcomes.values()) or _refused(outcomes, refused, "Refused for all recipients"))
    if relay and can_notify:
        told = tuple(address for address in refused if address not in silent)
        text = f"Accepted for {len(accepted)} recipients, the sender is notified of {len(told)} refused"
        if len(told) < len(refused):
            text += f" and did not want to be of {len(refused) - len(told)}"
        return Answer(Reply(250, "2.0.0", text), told, settled=tuple(refused))
    sent = f"Sent to {_names(accepted)}"
    return Answer(_refused(outcomes, refused, f"{sent}\nNOT sent to {_names(refused)}; do not send again to the first"))


def _come_again(outcomes: Mapping[str, Outcome], accepted: Sequence[str], waiting: Sequence[str]) -> Reply:
    if not accepted:
        common = _common(outcomes[address] for address in waiting)
        if common is not None and len(waiting) == len(outcomes):
            return common
        return Reply(451, "4.3.0", "Not sent yet, try again later")
    return Reply(451, "4.3.0", f"Accepted for {len(accepted)} of {len(outcomes)} recipients, try again later for the others\n"
                               "Those who have it do not get it again with the same message")


def _refused(outcomes: Mapping[str, Outcome], refused: Sequence[str], first: str) -> Reply:
    reasons: dict[str, list[str]] = {}
    for address in refused[:MAX_NAMED]:
        reply = outcomes[address].reply
        text = reply.text.split("\n", 1)[0]
        reasons.setdefault(f"{reply.code} {reply.enhanced} {text}".replace("  ", " "), []).append(address)
    lines = [*first.split("\n"), *(f"{_names(addresses)}: {reason}" for reason, addresses in reasons.items())]
    folded = [part for line in lines for part in wrap(printable(line), LINE_CHARACTERS)]
    return Reply(554, "5.3.0", "\n".join(folded))


def _common(outcomes: Iterable[Outcome]) -> Reply | None:
    """The upstream server's reply if it is the same for all: passed on with its code and text."""
    replies = {outcome.reply for outcome in outcomes}
    return replies.pop() if len(replies) == 1 else None


def _names(addresses: Sequence[str]) -> str:
    more = f" and {len(addresses) - MAX_NAMED} more" if len(addresses) > MAX_NAMED else ""
    return ", ".join(addresses[:MAX_NAMED]) + more


def printable(text: str) -> str:
    """ASCII without control characters: addresses may hold anything, and not every client has SMTPUTF8."""
    return "".join(c if " " <= c <= "~" else f"\\x{{{ord(c):X}}}" for c in text)
