"""Outgoing mail: serial numbers and the journal of what may have been sent (docs/format.md, Sender; RFC 1047).

`begin_send` is committed before any final dot leaves: a number once given out is never given out again, and a part that may
have been accepted is written down as in doubt. Of what leaves unsealed for all, only acceptance is written. All in functions of
a `Db`, run by the writer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sqlalchemy import and_, bindparam, case, delete, null, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from malote.errors import ClockWrong, Contended
from malote.store import members
from malote.store.database import Db, Row
from malote.store.postgres_statements import begin_new
from malote.store.records import Outcome, SendIntent, SendPlan, SendRecipient, SendRow, SendState
from malote.store.schema import SERVED, Statement, device, journal, serial

DAY_MS = 86_400_000
BUILD_DATE_MS = 1_795_392_000_000   # 2026-11-23: a clock before the time this was written is wrong; raised at each release

IN_FLIGHT_MS = 15 * 60_000  # nothing is in flight for longer than that, whatever its owner says or could not write down
PROOF_MS = 2_000            # how long the owner of what was answered may take to write down that the client has read that

_FIND = Statement(select(
    journal.c.recipient, journal.c.state, journal.c.submission_id, journal.c.first_at_ms,
    journal.c.stream, journal.c.serial, journal.c.prev, journal.c.reply, journal.c.attempt, journal.c.owner,
    journal.c.changed_at_ms,
).where(journal.c.key == bindparam("key")).with_for_update())     # on PostgreSQL, whoever else has an outcome of them waits
_WRITE = Statement(insert(journal).values({column: bindparam(column) for column in (
    "key", "recipient", "state", "attempt", "submission_id", "first_at_ms", "changed_at_ms", "stream", "serial", "prev",
    "owner",
)}).on_conflict_do_update(index_elements=["key", "recipient"], set_={
    "owner": bindparam("owner"), "state": bindparam("state"), "changed_at_ms": bindparam("changed_at_ms"),
    "stream": bindparam("stream"),
    "serial": bindparam("serial"), "prev": bindparam("prev"), "attempt": bindparam("attempt"),
    # not what another process wrote since we looked: SQLite has one writer at a time, PostgreSQL several
}, where=journal.c.attempt == bindparam("attempt") - 1).returning(journal.c.attempt))
_KNOWN = Statement(select(journal.c.state).where(journal.c.key == bindparam("key")).limit(1))
_SERVED = Statement(select(journal.c.state).where(journal.c.recipient == bindparam("recipient"), SERVED).limit(1))
_ACCEPT_PLAIN = Statement(insert(journal).values({column: bindparam(column) for column in (
    "key", "recipient", "state", "attempt", "submission_id", "first_at_ms", "changed_at_ms", "reply",
)}).on_conflict_do_update(index_elements=["key", "recipient"], set_={
    "state": bindparam("state"), "changed_at_ms": bindparam("changed_at_ms"), "reply": bindparam("reply"),
}))
_OUR_ROW = and_(
    journal.c.key == bindparam("at_key"), journal.c.recipient == bindparam("at_recipient"),
    journal.c.submission_id == bindparam("at_submission"),
)
_OUR_ATTEMPT = and_(_OUR_ROW, journal.c.attempt == bindparam("at_attempt"), journal.c.state == int(SendState.IN_DOUBT))
_FINISH = Statement(update(journal).where(_OUR_ROW, journal.c.state != int(SendState.ACCEPTED)).values(
    state=bindparam("state"), reply=bindparam("reply"), changed_at_ms=bindparam("changed_at_ms")))
_UNDO_FIRST = Statement(delete(journal).where(_OUR_ATTEMPT))
_UNDO = Statement(update(journal).where(_OUR_ATTEMPT).values(state=bindparam("state"), owner=null()))
_LET_GO = Statement(update(journal).where(_OUR_ATTEMPT).values(owner=null()))
_FORGET = Statement(delete(journal).where(_OUR_ROW, journal.c.state != int(SendState.IN_DOUBT)))
_TOUCH = Statement(update(journal).where(journal.c.key == bindparam("at_key")).values(changed_at_ms=bindparam("now_ms")))
_EXPIRE = Statement(delete(journal).where(tuple_(journal.c.key, journal.c.recipient).in_(
    select(journal.c.key, journal.c.recipient).where(journal.c.changed_at_ms < bindparam("before_ms")).limit(1000))))
_DROP_DEVICES = Statement(delete(device))

_NEW_DEVICE = Statement(insert(device).values({column: bindparam(column) for column in (
    "address", "skid", "slot", "stream", "last_sent_ms")}).on_conflict_do_nothing())
_SENT = Statement(update(device).where(
    device.c.address == bindparam("at_address"), device.c.skid == bindparam("at_skid"), device.c.slot == bindparam("at_slot"),
).values(last_sent_ms=case(
    (device.c.last_sent_ms < bindparam("now_ms"), bindparam("now_ms")), else_=device.c.last_sent_ms + 1,
)).returning(device.c.stream, device.c.last_sent_ms))
_NEXT = Statement(insert(serial).values(
    stream=bindparam("stream"), recipient=bindparam("recipient"), last=1, accepted=0,
).on_conflict_do_update(index_elements=["stream", "recipient"], set_={"last": serial.c.last + 1},
).returning(serial.c.last, serial.c.accepted))
_ACCEPTED = Statement(update(serial).where(
    serial.c.stream == bindparam("at_stream"), serial.c.recipient == bindparam("at_recipient"),
    serial.c.accepted < bindparam("accepted"),
).values(accepted=bindparam("accepted")))


def journal_key(intent: SendIntent) -> bytes:
    """Names (login, sender, hash of the original) in 32 bytes; each part is preceded by its length."""
    digest = hashlib.sha256()
    for part in (intent.login.encode("utf-8", "surrogatepass"), intent.sender.encode(), intent.journal_hash):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def begin_send(db: Db, intent: SendIntent, owner: bytes = b"", tenure: members.Tenure | None = None) -> SendPlan | None:
    """Numbers for every recipient that was not accepted before, and their rows "in doubt". Raises `ClockWrong`.

    `owner`: this process, where others share the store; None then says that one of them is sending the same message now.
    """
    key = journal_key(intent)
    if intent.now_ms < BUILD_DATE_MS:
        raise ClockWrong("the clock of this machine is before this version was made", hint="timedatectl set-ntp true")
    if db.distant and (plan := _begin_new(db, intent, key, owner, tenure)) is not None:
        return plan
    known: dict[str, Row] = {row[0]: row for row in db.rows(_FIND, {"key": key})}
    if owner and members.any_alive(db, _at_it(known.values(), owner, intent.now_ms)):
        return None
    submission_id, first_at_ms = os.urandom(16), intent.now_ms
    if known:
        _, _, submission_id, first_at_ms, *_ = min(known.values(), key=lambda row: (row[3], row[2]))
        # who was served stays remembered for as long as the client comes back for the others: a queue does so for days
        db.run(_TOUCH, {"at_key": key, "now_ms": intent.now_ms})
    stream, sent_at_ms = b"", intent.now_ms
    if any(recipient.sealed for recipient in intent.recipients):
        stream, sent_at_ms = _stamp(db, intent)
    recipients = {recipient.address: recipient for recipient in intent.recipients}      # each address once
    rows = _plan_rows(db, recipients.values(), known, stream)
    pending = [{
        "key": key, "recipient": row.address, "state": int(SendState.IN_DOUBT), "attempt": row.attempt,
        "submission_id": submission_id, "first_at_ms": first_at_ms, "changed_at_ms": intent.now_ms,
        "stream": row.stream or None, "serial": row.serial, "prev": row.prev, "owner": owner or None,
    } for row in rows if row.state is not SendState.ACCEPTED]
    if not all(db.each(_WRITE, pending)):
        raise Contended("the same message is being sent by another process")
    return SendPlan(key, submission_id, first_at_ms, sent_at_ms, tuple(rows), tenure=tenure)


def _begin_new(db: Db, intent: SendIntent, key: bytes, owner: bytes, tenure: members.Tenure | None) -> SendPlan | None:
    """None: there is something to be considered, and nothing was done."""
    addresses = list(dict.fromkeys(recipient.address for recipient in intent.recipients))
    if not addresses or not all(recipient.sealed for recipient in intent.recipients):
        return None
    submission_id = os.urandom(16)
    given = begin_new(db, {
        "sender": intent.sender, "skid": intent.skid, "slot": db.slot, "now_ms": intent.now_ms, "key": key,
        "owner": owner or None, "recipients": addresses, "state": int(SendState.IN_DOUBT), "submission_id": submission_id})
    if not given:
        return None
    if not all(address in given and given[address].written for address in addresses):
        raise Contended("the same message is being sent by another process")
    first = given[addresses[0]]
    _check_clock(intent.now_ms, first.sent_at_ms)
    rows = tuple(SendRow(address, SendState.NEW, True, first.stream, given[address].serial, given[address].prev, "", 1)
                 for address in addresses)
    return SendPlan(key, submission_id, intent.now_ms, first.sent_at_ms, rows, tenure=tenure)


def _check_clock(now_ms: int, sent_at_ms: int) -> None:
    """Raises `ClockWrong`; then nothing of this is committed."""
    if now_ms < sent_at_ms - 1 - DAY_MS:
        raise ClockWrong("the clock of this machine is more than a day before the last message that it signed",
                         hint="set it; if it was wrong then and is right now: malote store renew")


def _at_it(rows: Iterable[Row], owner: bytes, now_ms: int) -> set[bytes]:
    """The others that, if they are alive, are sending it, or have just answered and not yet heard whether that was read."""
    return {row[9] for row in rows if row[9] is not None and row[9] != owner
            and now_ms - row[10] < (IN_FLIGHT_MS if row[1] == SendState.IN_DOUBT else PROOF_MS)}


def _stamp(db: Db, intent: SendIntent) -> tuple[bytes, int]:
    """Our numbering for this identity, and a signed time after every earlier one of it."""
    at = {"at_address": intent.sender, "at_skid": intent.skid, "at_slot": db.slot, "now_ms": intent.now_ms}
    found = db.row(_SENT, at)
    if found is None:
        db.run(_NEW_DEVICE, {"address": intent.sender, "skid": intent.skid, "slot": db.slot, "stream": os.urandom(8),
                             "last_sent_ms": 0})
        found = db.row(_SENT, at)
    assert found is not None    # noqa: S101 -- inserted above or by another process
    stream, sent_at_ms = found
    _check_clock(intent.now_ms, sent_at_ms)
    return stream, sent_at_ms


def _plan_rows(db: Db, recipients: Iterable[SendRecipient], known: Mapping[str, Row], stream: bytes) -> list[SendRow]:
    rows, new = [], []
    for recipient in recipients:
        address = recipient.address
        state, reply, attempt = SendState.NEW, "", 1
        if (row := known.get(address)) is not None:
            _, number, _, _, old_stream, old_serial, old_prev, reply, attempt, *_ = row
            state, attempt = SendState(number), attempt + 1
            if state is SendState.ACCEPTED or (recipient.sealed and old_stream is not None):
                # the same numbers again: at the receiver the two are one message, whichever of them arrived
                rows.append(SendRow(address, state, old_stream is not None, old_stream or b"", old_serial, old_prev, reply,
                                    attempt))
                continue
        if recipient.sealed:
            new.append(len(rows))
        rows.append(SendRow(address, state, recipient.sealed, stream if recipient.sealed else b"", 0, 0, reply, attempt))
    given = db.each(_NEXT, [{"stream": stream, "recipient": rows[at].address} for at in new])
    for at, numbers in zip(new, given, strict=True):
        assert numbers is not None      # noqa: S101 -- INSERT ... DO UPDATE ... RETURNING always gives a row
        rows[at] = replace(rows[at], serial=numbers[0], prev=numbers[1])
    return rows


def plan_plain(intent: SendIntent) -> SendPlan:
    """A plan without rows, for a message of which all leaves unsealed."""
    recipients = dict.fromkeys(recipient.address for recipient in intent.recipients)
    rows = tuple(SendRow(address, SendState.NEW, False, b"", 0, 0, "", 1) for address in recipients)
    return SendPlan(journal_key(intent), os.urandom(16), intent.now_ms, intent.now_ms, rows, journaled=False)


def is_known(db: Db, key: bytes) -> bool:
    """Whether anything of an earlier attempt is written down."""
    return db.row(_KNOWN, {"key": key}) is not None


def is_served(db: Db, recipient: str) -> bool:
    """Whether there is a message that it got, or whose failure was told, of which a client may not know."""
    return db.row(_SERVED, {"recipient": recipient}) is not None


def _finish_plain(db: Db, plan: SendPlan, outcomes: Mapping[str, tuple[Outcome, str]], now_ms: int) -> None:
    """Only what was accepted matters later: what is in doubt and not sealed is sent again (RFC 1047)."""
    db.many(_ACCEPT_PLAIN, [{
        "key": plan.key, "recipient": address, "state": int(SendState.ACCEPTED), "attempt": 1, "reply": reply,
        "submission_id": plan.submission_id, "first_at_ms": plan.first_at_ms, "changed_at_ms": now_ms,
    } for address, (outcome, reply) in outcomes.items() if outcome in (Outcome.ACCEPTED, Outcome.SETTLED)])


def finish_send(db: Db, plan: SendPlan, outcomes: Mapping[str, tuple[Outcome, str]], now_ms: int) -> None:
    """Write down what became of each part; recipients not in `outcomes` stay in doubt.

    ACCEPTED is final, and so is SETTLED, which leaves the numbering alone: the receiver never got it. UNSENT takes back what
    `begin_send` wrote, unless another attempt began since: a part in doubt since an earlier attempt stays in doubt, a new one is
    gone and its number burnt (the next `prev` skips it, so the receiver misses nothing). After HELD another call
    follows.
    """
    if not plan.journaled:
        _finish_plain(db, plan, outcomes, now_ms)
        return
    finished, undone, gone, accepted, doubtful = [], [], [], [], []
    for row in plan.rows:
        outcome, reply = outcomes.get(row.address, (Outcome.IN_DOUBT, ""))
        at = {"at_key": plan.key, "at_recipient": row.address, "at_submission": plan.submission_id}
        if outcome is Outcome.HELD:
            continue
        if row.state is SendState.ACCEPTED or outcome is Outcome.IN_DOUBT:
            doubtful.append(at | {"at_attempt": row.attempt})
            continue
        if outcome is Outcome.UNSENT and row.state is SendState.NEW:
            gone.append(at | {"at_attempt": row.attempt})
        elif outcome is Outcome.UNSENT:
            undone.append(at | {"at_attempt": row.attempt, "state": int(row.state)})
        else:
            state = SendState.REFUSED if outcome is Outcome.REFUSED else SendState.ACCEPTED
            finished.append(at | {"state": int(state), "reply": reply, "changed_at_ms": now_ms})
        if outcome is Outcome.ACCEPTED and row.sealed:
            accepted.append({"at_stream": row.stream, "at_recipient": row.address, "accepted": row.serial})
    db.many(_FINISH, finished)
    db.many(_UNDO, undone)
    db.many(_UNDO_FIRST, gone)
    db.many(_ACCEPTED, accepted)
    if plan.tenure is not None:
        db.many(_LET_GO, doubtful)


def forget_send(db: Db, plan: SendPlan) -> None:
    """The client has read our reply: the same bytes again are a new message. What is in doubt stays."""
    at = {"at_key": plan.key, "at_submission": plan.submission_id}
    db.many(_FORGET, [at | {"at_recipient": row.address} for row in plan.rows])


def expire_journal(db: Db, before_ms: int) -> int:
    """Drop up to 1,000 rows untouched since `before_ms`; returns how many."""
    return db.run(_EXPIRE, {"before_ms": before_ms})


def renew_streams(db: Db) -> None:
    """New numberings for every identity: this store may be a copy of one that is in use elsewhere."""
    db.run(_DROP_DEVICES, {})
