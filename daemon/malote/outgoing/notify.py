"""Telling the sender by mail about recipients that were refused for good (notice.py): whether, and through the upstream server.

The notification leaves from the null sender, so that nobody answers it (RFC 3461 6.1), and as it is: it is not sealed, since
whoever reports a failure has no keys, and there is nothing in it that the outside has not seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from malote.core.policy import Action
from malote.core.primitives import sha256
from malote.errors import NotProven, UpstreamError
from malote.outgoing.answers import Outcome
from malote.outgoing.clearance import NoticeClearance
from malote.outgoing.copies import Letter, make_outer
from malote.outgoing.delivery import Delivery
from malote.outgoing.envelope import mail_params
from malote.outgoing.notice import Refused, make_notice
from malote.outgoing.transaction import Transaction
from malote.smtp.desk import Params
from malote.smtp.lanes import Lane

log = structlog.get_logger("malote.outgoing")

# RFC 3834 2: answers of programs are not answered. "auto-generated" begins a correspondence, and whoever runs that wants to know.
_ANSWERS = frozenset({"auto-replied", "auto-notified"})


def wants_notice(params: Params) -> bool:
    """RFC 3461 4.1: without NOTIFY, failures are reported."""
    notify = params.get("NOTIFY")
    return notify is None or "FAILURE" in str(notify).upper().split(",")


def may_notify(sender: str, letter: Letter) -> bool:
    """Never the null sender, and never about what is itself the answer of a program: two such would write to each other."""
    return bool(sender) and not any(name == "Auto-Submitted" and value in _ANSWERS for name, value in make_outer(letter).fields)


async def notify_sender(refused: Sequence[str], outcomes: Mapping[str, Outcome], delivery: Delivery, tx: Transaction, *,
                        host: str, remote: str, now_ms: int) -> bool:
    """False: the notification was not accepted, whatever the reason. `host`: our name; `remote`: that of the upstream server."""
    await tx.end()      # its connection may be the only one
    letter = delivery.letter
    items = [Refused(address, outcomes[address].reply, str(letter.recipients[address].params.get("ORCPT", "")),
                     "" if letter.recipients[address].action is Action.REFUSE else remote) for address in refused]
    # the same for the same failure: where the reply to the final dot was lost, the second copy can be told from another notice
    token = sha256(b"\0".join([b"malote notice", letter.submission_id, *(address.encode() for address in sorted(refused))]))[:16]
    notice = make_notice(
        items, sender=tx.sender, host=host, outer_headers=_seen_outside(delivery),
        envelope_id=str(tx.params.get("ENVID", "")), token=token.hex(), arrived_ms=letter.sent_at_ms, now_ms=now_ms)
    try:
        async with asyncio.timeout_at(delivery.deadline):
            return await _send(tx.lane, tx.sender, notice, NoticeClearance(letter, tx.sender))
    except NotProven as error:
        log.error("stopped by the last check", id=letter.submission_id.hex(), found=str(error), recipients=1)
        delivery.alarm = str(error)
        return False
    except (UpstreamError, TimeoutError) as error:
        log.warning("notification not sent", id=letter.submission_id.hex(), error=type(error).__name__)
        return False


def _seen_outside(delivery: Delivery) -> bytes:
    """The header that the others got; of a sealed copy with the Message-ID that it left with."""
    outer = make_outer(delivery.letter)
    if delivery.outer_ids:
        shown = delivery.outer_ids[0]
    elif any(recipient.action is Action.SEAL for recipient in delivery.letter.recipients.values()):
        shown = outer.message_id
    else:
        shown = delivery.letter.message_id      # all of it left as it is
    return outer.raw.replace(outer.message_id.encode(), shown.encode())


async def _send(lane: Lane, sender: str, notice: bytes, clearance: NoticeClearance) -> bool:
    extensions = lane.extensions
    client: dict[str, str | bool] = {} if notice.isascii() else {"BODY": "8BITMIME"}
    params = mail_params(client, sealed=False, size=len(notice), addresses=[sender], utf8_header=not notice.isascii(),
                         extensions=extensions)
    connection, reply = await lane.begin("", params)
    try:
        if reply.code // 100 != 2:
            return False
        reply = await connection.rcpt(sender, {"NOTIFY": "NEVER"} if "DSN" in connection.extensions else {})
        return reply.code // 100 == 2 and (await connection.data(notice, gate=clearance.check))[0].code // 100 == 2
    finally:
        await lane.release(connection)
