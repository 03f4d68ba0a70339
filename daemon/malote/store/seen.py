"""Seen state: one row for every message that was opened (docs/format.md, Freshness).

The rule itself is pure, in `core.freshness`; here is the one transaction around it. `INSERT ... ON CONFLICT DO NOTHING` decides
who was first: who inserted nothing looks again and judges again.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, bindparam, delete, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Judgement, SeenRow, SeenState, Verdict, decide_verdict
from malote.core.primitives import hmac_sha256
from malote.errors import StoreUnavailable
from malote.store.database import Db, Row
from malote.store.records import Stored
from malote.store.schema import Statement, card, distrust, seen

_COLUMNS = (
    seen.c.row_id, seen.c.manifest_id, seen.c.payload_digest, seen.c.original_mark, seen.c.verdict, seen.c.notes,
    seen.c.delivered, seen.c.id_held, seen.c.judged_at_ms,
)
_SAME_PAYLOAD = Statement(select(*_COLUMNS).where(
    seen.c.recipient == bindparam("recipient"), seen.c.payload_digest == bindparam("payload_digest")))
_SAME_ID = Statement(select(*_COLUMNS).where(
    seen.c.recipient == bindparam("recipient"), seen.c.manifest_id == bindparam("manifest_id"),
    seen.c.sender == bindparam("sender"),
).order_by(
    # first the same content, as far as `freshness.may_be_same` lets it stand for the claim; then what a conflict would be with
    and_(seen.c.original_mark == bindparam("original_mark"), or_(
        and_(literal(1) == bindparam("proven"), or_(seen.c.id_held.is_not(None), seen.c.verdict == str(Verdict.UNKNOWN_SENDER))),
        and_(literal(0) == bindparam("proven"), or_(seen.c.id_held.is_(None), seen.c.delivered == 1)),
    )).desc(), (seen.c.id_held.is_not(None)).desc(), seen.c.row_id,
).limit(1))
_STREAM = (seen.c.recipient == bindparam("recipient"), seen.c.skid == bindparam("skid"), seen.c.stream == bindparam("stream"))
_SAME_SERIAL = Statement(select(*_COLUMNS).where(*_STREAM, seen.c.serial_held == bindparam("serial")))
_SERIAL_SEEN = Statement(select(seen.c.row_id).where(*_STREAM, seen.c.serial_held == bindparam("serial")))
_STREAM_KNOWN = Statement(select(seen.c.row_id).where(*_STREAM, seen.c.serial_held.is_not(None)).limit(1))
_DISTRUST = Statement(select(func.max(distrust.c.before_ms)).where(
    distrust.c.recipient.in_((bindparam("recipient"), "")), distrust.c.sender.in_((bindparam("sender"), ""))))
_PINNED = Statement(select(card.c.skid, card.c.pinned_at_ms).where(
    or_(card.c.address == bindparam("sender"), card.c.address == bindparam("gateway"))))
_INSERT = Statement(insert(seen).values({column: bindparam(column) for column in (
    "recipient", "sender", "manifest_id", "id_held", "skid", "stream", "serial_held", "payload_digest", "original_mark",
    "verdict", "notes", "delivered", "judged_at_ms", "keep_from_ms",
)}).on_conflict_do_nothing().returning(seen.c.row_id))
_DELIVERED = Statement(update(seen).where(seen.c.row_id == bindparam("at_row")).values(delivered=1))
_EXPIRE = Statement(delete(seen).where(seen.c.row_id.in_(
    select(seen.c.row_id).where(seen.c.keep_from_ms < bindparam("before_ms")).limit(1000))).returning(seen.c.keep_from_ms))
_DISTRUST_MORE = Statement(insert(distrust).values(
    recipient=bindparam("recipient"), sender=bindparam("sender"), before_ms=bindparam("before_ms"),
).on_conflict_do_update(index_elements=["recipient", "sender"], set_={"before_ms": bindparam("before_ms")},
                        where=distrust.c.before_ms < bindparam("before_ms")))

_ATTEMPTS = 5   # each clash means that another writer made progress, and its row is then found


def judge(
    db: Db, mark_key: bytes, claim: Claim, arrival: Arrival, limits: FreshnessLimits, *, foreign: bool = False,
) -> Stored:
    """Judge and write down with `delivered = no`; with `foreign` as delivered, by somebody else. The same message again gives
    what was written the first time."""
    mark = hmac_sha256(mark_key, claim.original_sha512)
    for _ in range(_ATTEMPTS):
        state = _look_up(db, mark, claim)
        judgement = decide_verdict(claim, arrival, state, limits)
        if not judgement.record:
            return _again(db, state, judgement, foreign=foreign)
        row = db.row(_INSERT, _values(claim, arrival, judgement, mark, delivered=foreign))
        if row is not None:
            return Stored(judgement, row[0], first=True, delivered=foreign)
    raise StoreUnavailable("another process keeps changing what is remembered of this message")


def _again(db: Db, state: SeenState, judgement: Judgement, *, foreign: bool) -> Stored:
    row_id = judgement.row_id
    known = next((row for row in (state.same_payload, state.same_id) if row is not None and row.row_id == row_id), None)
    delivered = known is not None and known.delivered
    if foreign and row_id is not None and not delivered:
        mark_delivered(db, row_id)
        delivered = True
    return Stored(judgement, row_id, first=False, delivered=delivered)


def remembered(db: Db, recipient: str, payload_digest: bytes) -> SeenRow | None:
    """What was judged under this `Claim.payload_key`; its `original_sha512` is left empty."""
    row = db.row(_SAME_PAYLOAD, {"recipient": recipient, "payload_digest": payload_digest})
    return None if row is None else _row_values(row, b"")


def mark_delivered(db: Db, row_id: int) -> None:
    db.run(_DELIVERED, {"at_row": row_id})


def add_distrust(db: Db, before_ms: int, recipient: str, sender: str) -> None:
    """What was sent at or before `before_ms` is never FRESH; an earlier time than the one in force changes nothing."""
    db.run(_DISTRUST_MORE, {"before_ms": before_ms, "recipient": recipient, "sender": sender})


def expire_seen(db: Db, before_ms: int) -> int:
    """Drop up to 1,000 rows judged and sent before; returns how many.

    What was sent by then is never FRESH again: a server could give it its old date, in a folder that it calls new.
    """
    dropped = [keep_from_ms for (keep_from_ms,) in db.rows(_EXPIRE, {"before_ms": before_ms})]
    if dropped:
        add_distrust(db, max(dropped), "", "")
    return len(dropped)


def _look_up(db: Db, mark: bytes, claim: Claim) -> SeenState:
    at = {
        "recipient": claim.recipient, "sender": claim.sender, "manifest_id": claim.manifest_id,
        "payload_digest": claim.payload_key, "original_mark": mark, "skid": claim.skid, "stream": claim.stream,
        "proven": int(claim.proven),
    }
    return SeenState(
        same_payload=_seen_row(db.row(_SAME_PAYLOAD, at), claim, mark),
        same_id=_seen_row(db.row(_SAME_ID, at), claim, mark),
        same_serial=_seen_row(db.row(_SAME_SERIAL, at | {"serial": _signed(claim.serial)}), claim, mark),
        prev_seen=claim.prev == 0 or db.row(_SERIAL_SEEN, at | {"serial": _signed(claim.prev)}) is not None,
        stream_known=db.row(_STREAM_KNOWN, at) is not None,
        distrust_before_ms=_distrust_before(db, claim),
    )


def _distrust_before(db: Db, claim: Claim) -> int:
    at = {"recipient": claim.recipient, "sender": claim.sender, "gateway": "@" + claim.sender.rpartition("@")[2]}
    row = db.row(_DISTRUST, at)
    told: int = row[0] or 0 if row is not None else 0
    pins: dict[bytes, int] = dict(db.rows(_PINNED, at))
    # a person's card and the gateway's may both be held: the one that signed this counts
    pinned = pins.get(claim.skid, max(pins.values(), default=0))
    return max(told, pinned)


def _seen_row(row: Row | None, claim: Claim, mark: bytes) -> SeenRow | None:
    if row is None:
        return None
    return _row_values(row, claim.original_sha512 if row[3] == mark else b"")     # only the keyed mark is kept


def _row_values(row: Row, original_sha512: bytes) -> SeenRow:
    row_id, manifest_id, payload_digest, _, verdict, notes, delivered, id_held, judged_at_ms = row
    return SeenRow(
        row_id=row_id, manifest_id=manifest_id, payload_digest=payload_digest, original_sha512=original_sha512,
        verdict=Verdict(verdict), notes=tuple(notes.split()), delivered=bool(delivered), holds_id=id_held is not None,
        first_ms=judged_at_ms,
    )


def _values(claim: Claim, arrival: Arrival, judgement: Judgement, mark: bytes, *, delivered: bool) -> dict[str, Any]:
    return {
        "recipient": claim.recipient, "sender": claim.sender, "manifest_id": claim.manifest_id,
        "id_held": 1 if judgement.holds_id else None, "skid": claim.skid, "stream": claim.stream,
        "serial_held": _signed(claim.serial) if judgement.holds_serial else None, "payload_digest": claim.payload_key,
        "original_mark": mark, "verdict": str(judgement.verdict), "notes": " ".join(judgement.notes),
        "delivered": int(delivered), "judged_at_ms": arrival.now_ms,
        # a message signed for the future must be remembered until then, or it could come again as fresh
        "keep_from_ms": max(arrival.now_ms, claim.sent_at_ms),
    }


def _signed(serial: int) -> int:
    """A u64 as the 64-bit number that a database holds: any sender may write any serial."""
    return serial - 2**64 if serial >= 2**63 else serial
