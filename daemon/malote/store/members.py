"""Which processes share the store now, and what each of them has to itself (docs/operating.md, Several nodes).

A process is a member for as long as it renews that in time, by the clock of the database. All that it holds, leases and messages
in flight, is its own while it is a member and free afterwards: one row is renewed, however much is held.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from malote.store.database import Db
from malote.store.schema import Statement, lease, member

MEMBER_MS = 30_000      # how long without a renewal: then what it held is free
EDGE_MS = 1_000         # who renews later than this before the end may have been seen as gone: a commit takes its time
NODE_BYTES = 8          # of an owner: which node it belongs to

_RENEW = Statement(insert(member).values(
    owner=bindparam("owner"), until_ms=bindparam("until_ms"), accounts=bindparam("accounts"),
).on_conflict_do_update(index_elements=["owner"], set_={
    "until_ms": bindparam("until_ms"), "accounts": bindparam("accounts")}))
_KEEP = Statement(update(member).where(
    member.c.owner == bindparam("at_owner"), member.c.until_ms >= bindparam("edge_ms"),
).values(until_ms=bindparam("until_ms"), accounts=bindparam("accounts")))
_LEAVE = Statement(delete(member).where(member.c.owner == bindparam("owner")))
_BURY = Statement(delete(member).where(func.substr(member.c.owner, 1, NODE_BYTES) == bindparam("node")))
_GONE = Statement(delete(member).where(member.c.until_ms < bindparam("before_ms")))
_ALIVE = Statement(select(member.c.owner).where(member.c.owner == bindparam("owner"), member.c.until_ms >= bindparam("now_ms")))
_MEMBERS = Statement(select(member.c.owner, member.c.accounts).where(member.c.until_ms >= bindparam("now_ms")))
_LEASES = Statement(select(lease.c.name, lease.c.owner))
_TAKE = Statement(insert(lease).values(name=bindparam("name"), owner=bindparam("owner")).on_conflict_do_update(
    index_elements=["name"], set_={"owner": bindparam("owner")}))
_GIVE_BACK = Statement(delete(lease).where(lease.c.name == bindparam("at_name"), lease.c.owner == bindparam("at_owner")))
_HOLDS = Statement(select(lease.c.name).join(member, member.c.owner == lease.c.owner).where(
    lease.c.name == bindparam("name"), lease.c.owner == bindparam("owner"), member.c.until_ms >= bindparam("now_ms")))
_LOCK = "members"


class Tenure:
    """An unbroken time as a member, as this process knows it: by a clock that also runs while the machine is suspended, and from
    before the database was asked. Whoever acts on what it has to itself asks right before, since it may have been stopped in
    between (SIGSTOP, a suspended machine). Once lapsed it never holds again: whatever began under it belongs to others now."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = 0.0

    @staticmethod
    def clock() -> float:
        """In seconds."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def renew(self, asked: float) -> None:
        """`asked`: by `clock`, before the database was."""
        self._until = asked + MEMBER_MS / 1000

    def lapse(self) -> None:
        self._until = float("-inf")

    @property
    def seconds_left(self) -> float:
        return self._until - self.clock()


def renew(db: Db, owner: bytes, accounts: int) -> None:
    """For MEMBER_MS from now. `accounts`: how many mailboxes this process could watch."""
    db.run(_RENEW, {"owner": owner, "until_ms": db.now_ms() + MEMBER_MS, "accounts": accounts})


def keep(db: Db, owner: bytes, accounts: int) -> bool:
    """The same. False: it had run out, and others may have taken what was held."""
    db.lock(_LOCK)      # so that nobody takes a lease between our look and our commit
    now_ms = db.now_ms()
    if db.run(_KEEP, {"at_owner": owner, "until_ms": now_ms + MEMBER_MS, "accounts": accounts, "edge_ms": now_ms + EDGE_MS}):
        return True
    renew(db, owner, accounts)
    return False


def leave(db: Db, owner: bytes) -> None:
    """What it held is free at once. Also said of another, by whoever knows that it is dead."""
    db.run(_LEAVE, {"owner": owner})


def bury(db: Db, node: bytes) -> None:
    """All of that node are dead, as whoever has its lock knows."""
    db.run(_BURY, {"node": node})


def forget_gone(db: Db) -> None:
    """Rows of processes that ended long ago."""
    db.run(_GONE, {"before_ms": db.now_ms() - 10 * MEMBER_MS})


def any_alive(db: Db, owners: Iterable[bytes]) -> bool:
    """Whether one of these is a member."""
    found = list(owners)
    now_ms = db.now_ms() if found else 0
    return any(db.row(_ALIVE, {"owner": owner, "now_ms": now_ms}) is not None for owner in found)


def members(db: Db) -> dict[bytes, int]:
    """Owner to number of accounts that it could watch."""
    found: dict[bytes, int] = dict(db.rows(_MEMBERS, {"now_ms": db.now_ms()}))
    return found


def leases(db: Db) -> dict[str, bytes]:
    """Name to owner, of those that are held by a member."""
    alive = members(db)
    return {name: owner for name, owner in db.rows(_LEASES, {}) if owner in alive}


def take(db: Db, name: str, owner: bytes) -> bool:
    """False: another member holds it, or we are none ourselves."""
    db.lock(_LOCK)      # after it, each statement sees what others took before
    if not any_alive(db, [owner]) or leases(db).get(name, owner) != owner:
        return False
    db.run(_TAKE, {"name": name, "owner": owner})
    return True


def holds(db: Db, name: str, owner: bytes) -> bool:
    """Whether that lease is this member's now."""
    return db.row(_HOLDS, {"name": name, "owner": owner, "now_ms": db.now_ms()}) is not None


def give_back(db: Db, name: str, owner: bytes) -> None:
    db.run(_GIVE_BACK, {"at_name": name, "at_owner": owner})
