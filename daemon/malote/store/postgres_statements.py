"""Statements that only PostgreSQL knows."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import func, select, text

from malote.store.database import Db
from malote.store.schema import Statement

# All that `outbox.begin_send` does, in one message to the server, for a message that is new and sealed for all. Where it is
# known, or its sender has no numbering yet, nothing is done and nothing given.
_BEGIN_NEW = Statement(text("""
WITH sent AS (
  UPDATE device SET last_sent_ms = greatest(last_sent_ms + 1, CAST(:now_ms AS bigint))
  WHERE address = CAST(:sender AS text) AND skid = CAST(:skid AS bytea) AND slot = CAST(:slot AS bigint)
    AND NOT EXISTS (SELECT 1 FROM journal WHERE key = CAST(:key AS bytea))
  RETURNING stream, last_sent_ms
), given AS (
  INSERT INTO serial (stream, recipient, last, accepted)
  SELECT stream, recipient, 1, 0 FROM sent, unnest(CAST(:recipients AS text[])) AS recipient
  ON CONFLICT (stream, recipient) DO UPDATE SET last = serial.last + 1
  RETURNING stream, recipient, last, accepted
), written AS (
  INSERT INTO journal (key, recipient, state, attempt, submission_id, first_at_ms, changed_at_ms, stream, serial, prev, owner)
  SELECT CAST(:key AS bytea), recipient, CAST(:state AS bigint), 1, CAST(:submission_id AS bytea), CAST(:now_ms AS bigint),
    CAST(:now_ms AS bigint), stream, last, accepted, CAST(:owner AS bytea) FROM given
  ON CONFLICT DO NOTHING RETURNING recipient
)
SELECT recipient, sent.stream, given.last, given.accepted, sent.last_sent_ms, written.recipient IS NOT NULL
FROM sent CROSS JOIN given LEFT JOIN written USING (recipient)
"""))
_SKIPPED = 1_000_000    # more than a replica can lag behind
_ROW_IDS = func.pg_get_serial_sequence("seen", "row_id")
_SKIP = Statement(select(func.setval(_ROW_IDS, func.nextval(_ROW_IDS) + _SKIPPED)))


class Given(NamedTuple):
    """What `begin_new` gave to one recipient."""

    stream: bytes
    serial: int
    prev: int
    sent_at_ms: int
    written: bool       # False: another process began with the same message in the same moment


def begin_new(db: Db, values: dict[str, Any]) -> dict[str, Given]:
    """By recipient; empty: nothing was done."""
    return {recipient: Given(*given) for recipient, *given in db.rows(_BEGIN_NEW, values)}


def skip_rows(db: Db) -> None:
    """After a failover: row ids of judgements that were lost with the old server are given to no new message, since their
    deliveries may end only now (`seen.mark_delivered`)."""
    db.rows(_SKIP, {})
