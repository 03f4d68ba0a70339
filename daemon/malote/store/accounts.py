"""What a mailbox watcher remembers, the outcome log, and the outer Message-IDs. Functions of a `Db`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Table, Text, bindparam, case, delete, func, select
from sqlalchemy.dialects.postgresql import insert

from malote.store.database import Db
from malote.store.records import Attempt, FolderState, OutcomeEntry
from malote.store.schema import Statement, attempt, folder, outcome, outer_id

MAX_OUTCOMES = 20_000       # lines of `malote log` kept

_OUTCOME_COLUMNS = (
    "at_ms", "direction", "outcome", "account", "message_id", "sender", "recipients", "verdict", "detail", "took_ms",
)
_ATTEMPT_COLUMNS = ("account", "folder", "uidvalidity", "uid", "count", "next_at_ms", "reason")


def _upsert(table: Table, columns: tuple[str, ...], key: tuple[str, ...]) -> Statement:
    return Statement(insert(table).values({column: bindparam(column) for column in columns}).on_conflict_do_update(
        index_elements=list(key), set_={column: bindparam(column) for column in columns if column not in key}))


_FOLDER = Statement(select(folder.c.uidvalidity, folder.c.last_uid, folder.c.last_sync_ms).where(
    folder.c.account == bindparam("account"), folder.c.name == bindparam("name")))
_PUT_FOLDER = _upsert(folder, ("account", "name", "uidvalidity", "last_uid", "last_sync_ms"), ("account", "name"))

_ATTEMPTS = Statement(select(*(attempt.c[column] for column in _ATTEMPT_COLUMNS)).where(
    attempt.c.account == bindparam("account"), attempt.c.folder == bindparam("folder"),
).order_by(attempt.c.uid))
_PUT_ATTEMPT = _upsert(attempt, (*_ATTEMPT_COLUMNS, "changed_at_ms"), ("account", "folder", "uidvalidity", "uid"))
_DROP_ATTEMPT = Statement(delete(attempt).where(
    attempt.c.account == bindparam("at_account"), attempt.c.folder == bindparam("at_folder"),
    attempt.c.uidvalidity == bindparam("at_uidvalidity"), attempt.c.uid == bindparam("at_uid")))
_EXPIRE_ATTEMPTS = Statement(delete(attempt).where(attempt.c.changed_at_ms < bindparam("before_ms")))

_LOG = Statement(insert(outcome).values({column: bindparam(column) for column in _OUTCOME_COLUMNS}))
_RECENT = Statement(select(*(outcome.c[column] for column in _OUTCOME_COLUMNS))
                    .order_by(outcome.c.row_id.desc()).limit(bindparam("limit")))
_LAST_OUTCOME = Statement(select(func.max(outcome.c.row_id)))
_EXPIRE_OUTCOMES = Statement(delete(outcome).where(outcome.c.row_id <= bindparam("up_to")))

_OUTER = Statement(select(outer_id.c.outer_id, outer_id.c.participants).where(outer_id.c.inner_mark == bindparam("inner_mark")))
# Who had part in a message is what was said first: a later one of the same id must not add to it.
_PUT_OUTER = Statement(insert(outer_id).values({column: bindparam(column) for column in (
    "inner_mark", "outer_id", "at_ms", "participants",
)}).on_conflict_do_update(index_elements=["inner_mark"], set_={
    "outer_id": case((bindparam("outer_id", type_=Text) == "", outer_id.c.outer_id), else_=bindparam("outer_id")),
    "at_ms": bindparam("at_ms"),
    "participants": func.coalesce(outer_id.c.participants, bindparam("participants")),
}))
_EXPIRE_OUTER = Statement(delete(outer_id).where(outer_id.c.at_ms < bindparam("before_ms")))


def folder_state(db: Db, account: str, name: str) -> FolderState | None:
    row = db.row(_FOLDER, {"account": account, "name": name})
    return None if row is None else FolderState(*row)


def set_folder_state(db: Db, account: str, name: str, state: FolderState) -> None:
    db.run(_PUT_FOLDER, {"account": account, "name": name, "uidvalidity": state.uidvalidity, "last_uid": state.last_uid,
                         "last_sync_ms": state.last_sync_ms})


def attempts(db: Db, account: str, name: str) -> list[Attempt]:
    return [Attempt(*row) for row in db.rows(_ATTEMPTS, {"account": account, "folder": name})]


def put_attempt(db: Db, record: Attempt, now_ms: int) -> None:
    db.run(_PUT_ATTEMPT, {column: getattr(record, column) for column in _ATTEMPT_COLUMNS} | {"changed_at_ms": now_ms})


def clear_attempt(db: Db, account: str, name: str, uidvalidity: int, uid: int) -> None:
    db.run(_DROP_ATTEMPT, {"at_account": account, "at_folder": name, "at_uidvalidity": uidvalidity, "at_uid": uid})


def log_outcomes(db: Db, entries: Iterable[OutcomeEntry]) -> None:
    db.many(_LOG, [{column: getattr(entry, column) for column in _OUTCOME_COLUMNS} for entry in entries])


def recent_outcomes(db: Db, limit: int) -> list[OutcomeEntry]:
    """Newest first."""
    return [OutcomeEntry(**dict(zip(_OUTCOME_COLUMNS, row, strict=True))) for row in db.rows(_RECENT, {"limit": limit})]


def remember_message(db: Db, inner_mark: bytes, outer: str, participants: bytes | None, now_ms: int) -> None:
    db.many(_PUT_OUTER, [{"inner_mark": inner_mark, "outer_id": outer, "at_ms": now_ms, "participants": participants}])


def known_messages(db: Db, marks: dict[str, bytes]) -> dict[str, tuple[str, bytes | None]]:
    """Outer id and marks of the participants by inner id."""
    found: dict[str, tuple[str, bytes | None]] = {}
    for inner, mark in marks.items():
        row = db.row(_OUTER, {"inner_mark": mark})
        if row is not None:
            found[inner] = row[0], row[1]
    return found


def expire_rest(db: Db, before_ms: int) -> None:
    """What is not a safeguard: outer ids and attempts untouched since, and all but the newest outcomes."""
    at: dict[str, Any] = {"before_ms": before_ms}
    db.run(_EXPIRE_OUTER, at)
    db.run(_EXPIRE_ATTEMPTS, at)
    row = db.row(_LAST_OUTCOME, {})
    if row is not None and row[0] is not None:
        db.run(_EXPIRE_OUTCOMES, {"up_to": row[0] - MAX_OUTCOMES})
