"""Asking the rules without obeying them: for shadow mode, and for rules on trial."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from malote.core.message import prepare
from malote.core.policy import Action, MessageFacts
from malote.errors import FormatError, MailLoop, MaloteError, SenderRefused
from malote.outgoing.deciding import Decider, check_envelope
from malote.outgoing.identities import Submitter, check_own
from malote.outgoing.reporting import Line, why_refused
from malote.outgoing.shadow import Reason, Would, would
from malote.outgoing.transaction import Recipient, Transaction

log = structlog.get_logger("malote.outgoing")


async def judge(decider: Decider, tx: Transaction, submitter: Submitter, content: bytearray, line: Line) -> list[Would]:
    """What enforcement would do. Raises only what is no matter of the rules: a loop, and a From that a bound login may not
    use."""
    line.from_address = tx.sender
    policy, judged = decider.policy, []
    asked: dict[str, Recipient] = {}
    for each in tx.recipients:
        decision = policy.decide_recipient(MessageFacts(tx.sender), each.facts)
        like = Recipient(each.address, each.path, each.params, each.card, each.had_card, decision, policy, each.routes)
        try:
            check_envelope(policy, like, tx.sender)
        except MaloteError:
            judged.append(would(each.address, decision, refusal=Reason.RULE))
        else:
            asked[each.address] = like
    refusal: Reason | None = None
    try:
        prepared = await decider.work(len(content), prepare, content, *policy.tags)
        line.from_address = prepared.from_address
        check_own(submitter, prepared.from_address)
        await decider.decide(policy, prepared, content, asked, submitter, null_sender=not tx.sender)
    except MailLoop:
        raise
    except FormatError as error:
        if submitter.bound:
            raise
        log.info("shadow", reason=why_refused(error))
        return [would(address, None) for address in asked] + judged
    except SenderRefused:
        if submitter.bound and not submitter.owns(line.from_address):
            raise
        refusal = Reason.SENDER
    except MaloteError:
        refusal = Reason.OTHERS
    except Exception as error:  # noqa: BLE001 - a border: nothing that goes wrong in judging stops the mail
        log.warning("shadow: not judged", error=type(error).__name__)
        return []
    return [would(each.address, each.decision, refusal=refusal) for each in asked.values()] + judged


def changes(recipients: Iterable[Recipient]) -> list[Would]:
    """Whom the rules on trial would treat otherwise."""
    tried = [(each.address, each.action, *each.trial) for each in recipients if each.trial is not None]
    return [would(address, decision, refusal=Reason.OTHERS if action is Action.REFUSE else None)
            for address, done, action, decision in tried if action is not done]
