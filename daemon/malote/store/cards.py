"""Cards of others, our own identities, and the small secrets, as functions of a `Db`.

`CardCache` spares the hot path the look-up.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from malote.store.database import Db
from malote.store.records import CardRecord, Level, LockedIdentity, PastCard
from malote.store.schema import Statement, card, card_history, identity, meta, secret

_CARD_COLUMNS = ("address", "card_raw", "card_hash", "skid", "level", "evidence", "pinned_at_ms", "added_at_ms")
_CARD = Statement(select(card).where(card.c.address == bindparam("address")))
_CARDS = Statement(select(card).order_by(card.c.address))
_PUT_CARD = Statement(insert(card).values({column: bindparam(column) for column in _CARD_COLUMNS}).on_conflict_do_update(
    index_elements=["address"], set_={column: bindparam(column) for column in _CARD_COLUMNS[1:]}))
_DROP_CARD = Statement(delete(card).where(card.c.address == bindparam("at_address")))
_HISTORY = Statement(insert(card_history).values({column: bindparam(column) for column in (
    "address", "card_hash", "card_raw", "skid", "level", "first_at_ms", "last_at_ms",
)}).on_conflict_do_update(index_elements=["address", "card_hash"], set_={
    "level": bindparam("level"), "last_at_ms": bindparam("last_at_ms")}))
_PAST = Statement(select(
    card_history.c.address, card_history.c.card_raw, card_history.c.card_hash, card_history.c.skid, card_history.c.level,
    card_history.c.first_at_ms, card_history.c.last_at_ms,
).where(card_history.c.address == bindparam("address")).order_by(card_history.c.first_at_ms))
_HAD = Statement(select(func.count()).select_from(card_history).where(card_history.c.address == bindparam("address")))

_IDENTITY_COLUMNS = ("address", "skid", "locked", "card_raw", "added_at_ms", "changed_at_ms")
_IDENTITIES = Statement(select(identity).order_by(identity.c.address))
_PUT_IDENTITY = Statement(insert(identity).values({column: bindparam(column) for column in _IDENTITY_COLUMNS})
                          .on_conflict_do_update(index_elements=["address"], set_={
                              column: bindparam(column) for column in ("skid", "locked", "card_raw", "changed_at_ms")}))
_DROP_IDENTITY = Statement(delete(identity).where(identity.c.address == bindparam("at_address")))

_META = Statement(select(meta.c.value).where(meta.c.name == bindparam("name")))
_PUT_META = Statement(insert(meta).values(name=bindparam("name"), value=bindparam("value")).on_conflict_do_update(
    index_elements=["name"], set_={"value": bindparam("value")}))
_NEW_META = Statement(insert(meta).values(name=bindparam("name"), value=bindparam("value")).on_conflict_do_nothing())
_COUNT_UP = Statement(update(meta).where(meta.c.name == "cards").values(value=bindparam("value")))
_SECRET = Statement(select(secret.c.value).where(secret.c.name == bindparam("name")))
_NEW_SECRET = Statement(insert(secret).values(name=bindparam("name"), value=bindparam("value")).on_conflict_do_nothing())
_DROP_SECRET = Statement(delete(secret).where(secret.c.name == bindparam("at_name")))


def find_card(db: Db, address: str) -> CardRecord | None:
    row = db.row(_CARD, {"address": address})
    return None if row is None else _card_record(row)


def list_cards(db: Db) -> list[CardRecord]:
    return [_card_record(row) for row in db.rows(_CARDS, {})]


def put_card(db: Db, record: CardRecord) -> None:
    """Hold this card for its address, in the place of another. Whether it may take that place is the caller's to check."""
    db.run(_PUT_CARD, {
        "address": record.address, "card_raw": record.card_raw, "card_hash": record.card_hash, "skid": record.skid,
        "level": str(record.level), "evidence": record.evidence, "pinned_at_ms": record.pinned_at_ms,
        "added_at_ms": record.added_at_ms,
    })
    db.run(_HISTORY, {
        "address": record.address, "card_hash": record.card_hash, "card_raw": record.card_raw, "skid": record.skid,
        "level": str(record.level), "first_at_ms": record.added_at_ms, "last_at_ms": record.added_at_ms,
    })
    note_change(db)


def remove_card(db: Db, address: str) -> bool:
    """False: there was none. That there was one is never forgotten."""
    removed = db.run(_DROP_CARD, {"at_address": address}) > 0
    note_change(db)
    return removed


def past_cards(db: Db, address: str) -> list[PastCard]:
    return [PastCard(address, raw, card_hash, skid, Level(level), first, last)
            for address, raw, card_hash, skid, level, first, last in db.rows(_PAST, {"address": address})]


def had_card(db: Db, address: str) -> bool:
    row = db.row(_HAD, {"address": address})
    return row is not None and row[0] > 0


def list_identities(db: Db) -> list[LockedIdentity]:
    return [LockedIdentity(*row) for row in db.rows(_IDENTITIES, {})]


def put_identity(db: Db, record: LockedIdentity) -> None:
    """Hold this identity; one of the same address is replaced, its `added_at_ms` stays."""
    db.run(_PUT_IDENTITY, {column: getattr(record, column) for column in _IDENTITY_COLUMNS})
    note_change(db)


def remove_identity(db: Db, address: str) -> bool:
    removed = db.run(_DROP_IDENTITY, {"at_address": address}) > 0
    note_change(db)
    return removed


def find_meta(db: Db, name: str) -> bytes | None:
    row = db.row(_META, {"name": name})
    return None if row is None else row[0]


def put_meta(db: Db, name: str, value: bytes) -> None:
    db.run(_PUT_META, {"name": name, "value": value})


def local_key(db: Db, name: str) -> bytes:
    """32 random bytes of that name, made at the first call."""
    row = db.row(_SECRET, {"name": name})
    if row is None:
        db.run(_NEW_SECRET, {"name": name, "value": os.urandom(32)})
        row = db.row(_SECRET, {"name": name})
    assert row is not None      # noqa: S101 -- inserted above or by another process
    key: bytes = row[0]
    return key


def drop_local_key(db: Db, name: str) -> None:
    db.run(_DROP_SECRET, {"at_name": name})


def note_change(db: Db) -> None:
    """Tell every process, at its next look, that cards or identities changed: a new random mark needs no reading before."""
    mark = os.urandom(16)
    if db.run(_COUNT_UP, {"value": mark}) == 0:
        db.run(_NEW_META, {"name": "cards", "value": mark})


def change_mark(db: Db) -> bytes:
    return find_meta(db, "cards") or b""


def _card_record(row: tuple[object, ...]) -> CardRecord:
    address, raw, card_hash, skid, level, evidence, pinned_at_ms, added_at_ms = row
    return CardRecord(address, raw, card_hash, skid, Level(str(level)), evidence, pinned_at_ms, added_at_ms)  # type: ignore[arg-type]


class CardCache:
    """What was looked up, also what was not found, as long as the store's change mark is the same."""

    MAX = 4_000     # a card is 3 to 8 KB: 30 MB at most

    def __init__(self) -> None:
        self.mark = b""
        self._known: OrderedDict[str, tuple[CardRecord | None, bool]] = OrderedDict()

    def get(self, address: str) -> tuple[CardRecord | None, bool] | None:
        """(the card, whether there ever was one); None: not looked up yet."""
        return self._known.get(address)

    def fill(self, mark: bytes, found: Iterable[tuple[str, CardRecord | None, bool]]) -> None:
        self.check(mark)
        for address, record, had in found:
            self._known[address] = (record, had)
            if len(self._known) > self.MAX:
                self._known.popitem(last=False)

    def check(self, mark: bytes) -> None:
        if mark != self.mark:
            self._known.clear()
            self.mark = mark
