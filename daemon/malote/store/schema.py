"""The tables, once for SQLite and PostgreSQL, and how a statement on them is run at little cost.

Column types are only whole numbers, text and bytes: those three come back from every driver as they went in, so a statement
may go to the driver directly. Flags are 0 or 1, times are ms since epoch UTC. On SQLite every table is STRICT.

A column's meaning is never changed; a new meaning is a new column and a new migration.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Executable, Index, Integer, LargeBinary, MetaData, Table, Text, text
from sqlalchemy.dialects import postgresql, sqlite

REVISIONS = ("0001", "0002", "0003", "0004", "0005")   # every schema version there ever was, oldest first: migrations/
CURRENT = REVISIONS[-1]

Number = BigInteger().with_variant(Integer(), "sqlite")     # STRICT knows INTEGER, not BIGINT; both hold 64 bits
metadata = MetaData()


def _table(name: str, *columns: Column[Any] | Index, rowid: bool = False) -> Table:
    return Table(name, metadata, *columns, sqlite_strict=True, sqlite_with_rowid=rowid)


def _key(name: str, kind: Any) -> Column[Any]:
    return Column(name, kind, primary_key=True, nullable=False, autoincrement=False)


def _number(name: str, *, default: int | None = None) -> Column[Any]:
    return Column(name, Number, nullable=False, server_default=None if default is None else str(default))


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False, server_default="")


def _bytes(name: str) -> Column[Any]:
    return Column(name, LargeBinary, nullable=False)


# Small things by name: "keyring" (header of the passphrase), "host" (which machine this is), "cards" (counts every change).
meta = _table("meta", _key("name", Text), _bytes("value"))

# Random keys that never leave the store: journal hashes, account marks.
secret = _table("secret", _key("name", Text), _bytes("value"))

identity = _table(
    "identity", _key("address", Text),
    _bytes("skid"), _bytes("locked"), _bytes("card_raw"), _number("added_at_ms"), _number("changed_at_ms"),
)

card = _table(
    "card", _key("address", Text),
    _bytes("card_raw"), _bytes("card_hash"), _bytes("skid"), _text("level"), _text("evidence"),
    _number("pinned_at_ms"),    # when this line of keys (a card and the ones it signed) was first held: distrust_before
    _number("added_at_ms"),     # when this card was
)

# Every card ever held, also after removal: whoever had a card is not written to in clear by default.
card_history = _table(
    "card_history", _key("address", Text), _key("card_hash", LargeBinary),
    _bytes("card_raw"), _bytes("skid"), _text("level"), _number("first_at_ms"), _number("last_at_ms"),
)

# One numbering of ours. A new one begins for a new signing key, and when the store finds itself on another machine. Of several
# processes that share a database each uses the rows of its own slot, so that none waits for another's commit.
device = _table(
    "device", _key("address", Text), _key("skid", LargeBinary), _key("slot", Number),
    _bytes("stream"), _number("last_sent_ms"),
)
serial = _table(
    "serial", _key("stream", LargeBinary), _key("recipient", Text),
    _number("last"),            # last number given out
    _number("accepted"),        # last number of a message that the upstream accepted: the `prev` of the next
)

SERVED = text("state = 2")      # records.SendState.ACCEPTED; in words, as a statement must say it too to be helped by the index

# One row per (login, sender, hash of the original) = key, and recipient.
journal = _table(
    "journal", _key("key", LargeBinary), _key("recipient", Text),
    _number("state"),           # records.SendState
    _number("attempt"),         # how many began: one that sent nothing must not undo what a later one did
    _bytes("submission_id"), _number("first_at_ms"), _number("changed_at_ms"),
    Column("stream", LargeBinary), _number("serial", default=0), _number("prev", default=0),    # stream NULL: went unsealed
    _text("reply"),
    Column("owner", LargeBinary),   # the member that is, or was last, sending it; NULL: nobody else shares the store
    Index("journal_served", "recipient", sqlite_where=SERVED, postgresql_where=SERVED),
)

# A process that shares the store with others. It is one until `until_ms`, by the database's clock.
member = _table("member", _key("owner", LargeBinary), _number("until_ms"), _number("accounts", default=0))

# What one member at a time has to itself, for as long as it is one.
lease = _table("lease", _key("name", Text), _bytes("owner"))

# One row per message that was opened. The `_held` columns are NULL unless the row takes part in the unique key: a message whose
# sender is not proven must never block the number of a genuine one.
seen = _table(
    "seen", Column("row_id", Number, primary_key=True, nullable=False, autoincrement=True),
    _text("recipient"), _text("sender"), _bytes("manifest_id"), Column("id_held", Number),
    _bytes("skid"), _bytes("stream"), Column("serial_held", Number),
    _bytes("payload_digest"), _bytes("original_mark"),      # keyed: equal contents of two stores cannot be told
    _text("verdict"), _text("notes"), _number("delivered", default=0),
    _number("judged_at_ms"),
    _number("keep_from_ms"),    # judged or signed time, whichever is later: from here `remember` counts
    Index("seen_payload", "recipient", "payload_digest", unique=True),
    Index("seen_id", "recipient", "manifest_id", "sender", "id_held", unique=True),
    Index("seen_serial", "recipient", "skid", "stream", "serial_held", unique=True),
    Index("seen_keep", "keep_from_ms"),
    rowid=True,
)

# Mail sent before this time by this sender to this recipient may be a repeat that we no longer know; "" means any.
distrust = _table("distrust", _key("recipient", Text), _key("sender", Text), _number("before_ms"))

folder = _table(
    "folder", _key("account", Text), _key("name", Text),
    _number("uidvalidity"), _number("last_uid"), _number("last_sync_ms"),
)

# Messages that could not be dealt with: when to try again.
attempt = _table(
    "attempt", _key("account", Text), _key("folder", Text), _key("uidvalidity", Number), _key("uid", Number),
    _number("count"), _number("next_at_ms"), _text("reason"), _number("changed_at_ms"),
)

outcome = _table(
    "outcome", Column("row_id", Number, primary_key=True, nullable=False, autoincrement=True),
    _number("at_ms"), _text("direction"), _text("account"), _text("message_id"), _text("sender"), _number("recipients"),
    _text("outcome"), _text("verdict"), _text("detail"), _number("took_ms"),
    rowid=True,
)

# Message-IDs of sealed mail as others see them, found by a keyed hash of the inner one.
outer_id = _table(
    "outer_id", _key("inner_mark", LargeBinary), _text("outer_id"), _number("at_ms"),
    Column("participants", LargeBinary),    # marks of all whom it was from or for, in a row; NULL: not opened here, or not proven
    Index("outer_id_at", "at_ms"),
)


class Statement:
    """One SQLAlchemy statement and the text it compiles to for each database, made once.

    Executed by SQLAlchemy's Core an upsert costs 26 us, its text given to the driver 6 (measured, SQLite). The hot path has a
    dozen statements per message. Inserts are PostgreSQL's, whose ON CONFLICT compiles for both.
    """

    __slots__ = ("_numbered", "constants", "core", "text")

    def __init__(self, core: Executable) -> None:
        compiled = core.compile(dialect=_NAMED)     # type: ignore[attr-defined]
        self.core = core
        self.text = str(compiled)
        self.constants: dict[str, Any] = {name: value for name, value in compiled.params.items() if value is not None}
        self._numbered: tuple[str, tuple[tuple[str, Any], ...]] | None = None

    @property
    def numbered(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """For PostgreSQL: the text with $1, $2, ..., and the name and constant (None: must be given) of each of them."""
        if self._numbered is None:      # not before it is needed: most stores are SQLite
            compiled = self.core.compile(dialect=_NUMBERED)     # type: ignore[attr-defined]
            self._numbered = str(compiled), tuple((name, compiled.params[name]) for name in compiled.positiontup or ())
        return self._numbered


_NAMED = sqlite.dialect(paramstyle="named")
_NUMBERED = postgresql.asyncpg.dialect(paramstyle="numeric_dollar")     # type: ignore[no-untyped-call]
