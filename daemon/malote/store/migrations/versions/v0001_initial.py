"""The first schema. A migration is history: it never changes, and takes nothing from `schema`, which does."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _key(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True, nullable=False, autoincrement=False)


def _number(name: str, default: str | None = None) -> sa.Column[Any]:
    return sa.Column(name, NUMBER, nullable=False, server_default=default)


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=False, server_default="")


def _bytes(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.LargeBinary(), nullable=False)


def _table(name: str, *columns: sa.Column[Any], rowid: bool = False) -> None:
    op.create_table(name, *columns, sqlite_strict=True, sqlite_with_rowid=rowid)


def upgrade() -> None:
    _keys()
    _outgoing()
    _incoming()
    _table("outcome", sa.Column("row_id", NUMBER, primary_key=True, nullable=False, autoincrement=True),
           _number("at_ms"), _text("direction"), _text("account"), _text("message_id"), _text("sender"), _number("recipients"),
           _text("outcome"), _text("verdict"), _text("detail"), _number("took_ms"), rowid=True)


def _keys() -> None:
    _table("meta", _key("name", sa.Text()), _bytes("value"))
    _table("secret", _key("name", sa.Text()), _bytes("value"))
    _table("identity", _key("address", sa.Text()), _bytes("skid"), _bytes("locked"), _bytes("card_raw"),
           _number("added_at_ms"), _number("changed_at_ms"))
    _table("card", _key("address", sa.Text()), _bytes("card_raw"), _bytes("card_hash"), _bytes("skid"), _text("level"),
           _text("evidence"), _number("pinned_at_ms"), _number("added_at_ms"))
    _table("card_history", _key("address", sa.Text()), _key("card_hash", sa.LargeBinary()), _bytes("card_raw"), _bytes("skid"),
           _text("level"), _number("first_at_ms"), _number("last_at_ms"))


def _outgoing() -> None:
    _table("device", _key("address", sa.Text()), _key("skid", sa.LargeBinary()), _bytes("stream"), _number("last_sent_ms"))
    _table("serial", _key("stream", sa.LargeBinary()), _key("recipient", sa.Text()), _number("last"), _number("accepted"))
    _table("journal", _key("key", sa.LargeBinary()), _key("recipient", sa.Text()), _number("state"), _number("attempt"),
           _bytes("submission_id"), _number("first_at_ms"), _number("changed_at_ms"), sa.Column("stream", sa.LargeBinary()),
           _number("serial", "0"), _number("prev", "0"), _text("reply"))
    _table("outer_id", _key("inner_mark", sa.LargeBinary()), _text("outer_id"), _number("at_ms"))
    op.create_index("outer_id_at", "outer_id", ["at_ms"])


def _incoming() -> None:
    _table("seen", sa.Column("row_id", NUMBER, primary_key=True, nullable=False, autoincrement=True),
           _text("recipient"), _text("sender"), _bytes("manifest_id"), sa.Column("id_held", NUMBER),
           _bytes("skid"), _bytes("stream"), sa.Column("serial_held", NUMBER), _bytes("payload_digest"), _bytes("original_mark"),
           _text("verdict"), _text("notes"), _number("delivered", "0"), _number("judged_at_ms"), _number("keep_from_ms"),
           rowid=True)
    op.create_index("seen_payload", "seen", ["recipient", "payload_digest"], unique=True)
    op.create_index("seen_id", "seen", ["recipient", "manifest_id", "sender", "id_held"], unique=True)
    op.create_index("seen_serial", "seen", ["recipient", "skid", "stream", "serial_held"], unique=True)
    op.create_index("seen_keep", "seen", ["keep_from_ms"])
    _table("distrust", _key("recipient", sa.Text()), _key("sender", sa.Text()), _number("before_ms"))
    _table("folder", _key("account", sa.Text()), _key("name", sa.Text()), _number("uidvalidity"), _number("last_uid"),
           _number("last_sync_ms"))
    _table("attempt", _key("account", sa.Text()), _key("folder", sa.Text()), _key("uidvalidity", NUMBER), _key("uid", NUMBER),
           _number("count"), _number("next_at_ms"), _text("reason"), _number("changed_at_ms"))
