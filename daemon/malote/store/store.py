"""What must survive: identities, cards, serial numbers, journal and seen state, behind one asynchronous object."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from malote.core.freshness import Arrival, Claim, FreshnessLimits, SeenRow
from malote.core.primitives import hmac_sha256
from malote.errors import LeaseLost, SentElsewhere, StoreUnavailable
from malote.store import accounts, cards, members, outbox, places, seen
from malote.store.database import Db, Reader
from malote.store.held import Held
from malote.store.opening import after_loss, open_place
from malote.store.places import PostgresPlace
from malote.store.records import (
    Attempt,
    CardRecord,
    FolderState,
    KnownMessage,
    Level,
    LockedIdentity,
    Outcome,
    OutcomeEntry,
    PastCard,
    SendIntent,
    SendPlan,
    Stored,
    participant_mark,
    split_marks,
)
from malote.store.writer import Commits

DAY_MS = 86_400_000
CARD_CHECK_SECONDS = 0.5    # how old the cache of cards may be when another process changes one: seen within a second

T = TypeVar("T")


class Store:
    """Open one with `await Store.open(directory)`. All methods may be called from several tasks at once.

    Every method raises `StoreUnavailable` while the database is full, locked, read-only or damaged; nothing of that operation
    was then done, and the next call tries anew.
    """

    def __init__(self, writer: Commits, reader: Reader | None, keys: Mapping[str, bytes]) -> None:
        self._writer = writer
        self._reader = reader
        self._held = Held(writer)
        self._keys = dict(keys)
        self._cache = cards.CardCache()
        self._owner = b""           # this process, where others share the store (`join`)
        self._node = b""
        self.tenure = members.Tenure()      # as one of those; of no meaning before `join`
        self._checked_at = 0.0
        self.on_outcome: Callable[[OutcomeEntry], object] | None = None     # told of each line of `malote log`, for metrics

    @classmethod
    async def open(
        cls, place: str | Path | PostgresPlace, *, readonly: bool = False, machine_id: bytes | None = None,
    ) -> Store:
        """Open the store in the directory `place` (or `sqlite:///DIRECTORY`), or in PostgreSQL, made and migrated if need be.

        `machine_id` is this machine's; the default is that of the operating system. A store that finds itself on another
        machine than before, or in a database whose server lost its place to another, begins new numberings and calls nothing
        FRESH that was sent before.
        """
        opened = await open_place(place, places.machine_id() if machine_id is None else machine_id, readonly=readonly)
        store = cls(opened.writer, opened.reader, opened.keys)
        store._node = opened.node
        return store

    async def close(self) -> None:
        """Write what is waiting and close the file."""
        self._held.close()
        if self._reader is not None:
            self._reader.close()
        await self._writer.close()

    @property
    def failing(self) -> bool:
        """Whether the last write failed."""
        return self._writer.failing

    async def check_writable(self, now_ms: int) -> None:
        """Writes something that nobody reads. Raises `StoreUnavailable`."""
        await self._writer.write(lambda db: cards.put_meta(db, "written", str(now_ms).encode()))

    async def claim(self, name: str) -> bool:
        """Whether nobody else has claimed that name on this database; it is then ours until `close`. Of SQLite, whose directory
        has locks for that, always True."""
        return await self._writer.claim(name)

    async def flush(self) -> None:
        """Return when everything submitted before is written, also what nobody waits for."""
        self._held.release_all()
        await self._writer.write(lambda _db: None)

    # ---- cards and identities --------------------------------------------------------------------------------------------

    async def card(self, address: str) -> CardRecord | None:
        """The card held for exactly this address, or "@domain"."""
        return (await self.cards((address,))).get(address)

    async def cards(self, addresses: Iterable[str]) -> dict[str, CardRecord]:
        """The cards held for these addresses; those without one are left out."""
        return {address: record for address, (record, _) in (await self._look_up(addresses)).items() if record is not None}

    async def had_card(self, addresses: Iterable[str]) -> set[str]:
        """Those of the addresses for which a card is or ever was held."""
        return {address for address, (_, had) in (await self._look_up(addresses)).items() if had}

    async def put_card(
        self, address: str, card_raw: bytes, skid: bytes, *, level: Level, evidence: str, now_ms: int, succession: bool,
    ) -> CardRecord:
        """Hold this card from now on. `succession`: the card held before signed it, so the pin time stays.

        Whether the card may be taken is for the caller (`core.card.check_succession`). A weaker level never replaces a
        stronger one of the same line of keys.
        """
        def put(db: Db) -> CardRecord:
            db.lock("cards")
            old = cards.find_card(db, address)
            same_line = old is not None and (succession or old.skid == skid)
            pinned_at_ms, kept = (old.pinned_at_ms, old.level) if old is not None and same_line else (now_ms, level)
            record = CardRecord(address, card_raw, hashlib.sha256(card_raw).digest(), skid, max(kept, level, key=_rank), evidence,
                                pinned_at_ms, now_ms)
            cards.put_card(db, record)
            return record
        return await self._change(put)

    async def remove_card(self, address: str) -> bool:
        """False: there was none."""
        return await self._change(lambda db: cards.remove_card(db, address))

    async def list_cards(self) -> list[CardRecord]:
        return await self._writer.read(cards.list_cards)

    async def past_cards(self, address: str) -> list[PastCard]:
        """Every card ever held for this address, oldest first."""
        return await self._writer.read(lambda db: cards.past_cards(db, address))

    async def identities(self) -> list[LockedIdentity]:
        return await self._writer.read(cards.list_identities)

    async def put_identity(self, identity: LockedIdentity) -> None:
        """Hold this identity in the place of one of the same address."""
        await self._change(lambda db: cards.put_identity(db, identity))

    async def remove_identity(self, address: str) -> bool:
        """False: there was none."""
        return await self._change(lambda db: cards.remove_identity(db, address))

    async def change_mark(self) -> bytes:
        """Differs whenever a card or identity was changed since, by any process: ask before using what was unlocked earlier."""
        mark = await self._writer.read(cards.change_mark)
        self._cache.check(mark)
        self._checked_at = time.monotonic()
        return mark

    async def keyring_header(self) -> bytes | None:
        """Salt and cost of the passphrase; None before the first identity."""
        return await self._writer.read(lambda db: cards.find_meta(db, "keyring"))

    async def set_keyring(self, header: bytes, identities: Iterable[LockedIdentity] = ()) -> None:
        """A new passphrase: its header, and the identities locked under it, in one transaction."""
        records = tuple(identities)

        def put(db: Db) -> None:
            cards.put_meta(db, "keyring", header)
            for record in records:
                cards.put_identity(db, record)
        await self._change(put)

    async def local_key(self, name: str) -> bytes:
        """32 random bytes that only this store has, made once for each name."""
        if name not in self._keys:      # those of a machine are there since it was opened, where several share the store
            self._keys[name] = await self._writer.write(lambda db: cards.local_key(db, name))
        return self._keys[name]

    async def gateway_keys(self) -> tuple[bytes, ...]:
        """What the watchers behind our gateways know our word by (`core.gateway_word`), newest first."""
        found = await self._writer.read(lambda db: cards.find_meta(db, "gateway keys")) or b""
        return tuple(found[start:start + 32] for start in range(0, len(found), 32))

    async def set_gateway_keys(self, keys: Iterable[bytes]) -> None:
        value = b"".join(keys)
        await self._writer.write(lambda db: cards.put_meta(db, "gateway keys", value))

    # ---- outgoing --------------------------------------------------------------------------------------------------------

    async def begin_send(self, intent: SendIntent) -> SendPlan:
        """Serials and "in doubt" rows, durable when this returns; only then may anything be sealed or sent.

        Raises `ClockWrong`; `SentElsewhere` while another process that shares the store sends the same.
        """
        self._held.release_plan(outbox.journal_key(intent))
        tenure = self.tenure if self._owner else None       # of before: what is written down counts for it
        plan = await self._writer.write(lambda db: outbox.begin_send(db, intent, self._owner, tenure))
        if plan is None:
            raise SentElsewhere
        return plan

    def let_go(self, plan: SendPlan) -> None:
        """Nothing was sent after all, and nothing is known of it: others may try at once. Not waited for."""
        if plan.tenure is not None:
            self._writer.later(lambda db: outbox.finish_send(db, plan, {}, plan.first_at_ms))

    def begin_plain(self, intent: SendIntent) -> SendPlan | None:
        """A plan for a message that leaves unsealed for everybody, in one transaction; None: use `begin_send`.

        It costs no commit, and gives the same promises as a journaled plan does for unsealed parts. A row "in doubt" of such a
        part only says that it is sent again (RFC 1047), as if there were no row. What a retry must find is "accepted": in this
        process it does from the moment of `finish_send_later` on (it is held here, then written in order before the retry's
        own `begin_send`); after a crash, once it is written, as with a journaled plan. And anything that
        an earlier attempt wrote, by whatever process, is looked for here before any byte leaves: its rows are committed before
        that attempt sent anything, or after it was answered. Where that look fails, or writing does, the answer is None; so it
        is on PostgreSQL, where a look costs as much as writing with others in one commit, and for a member (`join`), since the
        others look into the journal for what is in flight.
        """
        if self._owner or self._reader is None or intent.now_ms < outbox.BUILD_DATE_MS or self._writer.failing:
            return None
        plan = outbox.plan_plain(intent)
        if self._held.release_plan(plan.key) or self._reader.look(lambda db: outbox.is_known(db, plan.key)) is not False:
            return None
        return plan

    async def finish_send(self, plan: SendPlan, outcomes: Mapping[str, tuple[Outcome, str]], now_ms: int) -> None:
        """Outcome and the upstream's reply for each recipient; those left out stay in doubt. Durable when this returns."""
        if not plan.journaled and not any(outcome in (Outcome.ACCEPTED, Outcome.SETTLED) for outcome, _ in outcomes.values()):
            return      # nothing that a retry would have to know
        await self._writer.write(lambda db: outbox.finish_send(db, plan, outcomes, now_ms))

    def finish_send_later(self, plan: SendPlan, outcomes: Mapping[str, tuple[Outcome, str]], now_ms: int) -> None:
        """The same, not waited for, but before every `begin_send` that is called later: for when the client is told 250.

        Lost in a crash it leaves the rows in doubt, and nobody comes back for a message that was accepted.
        """
        if plan.journaled:
            self._writer.later(lambda db: outbox.finish_send(db, plan, outcomes, now_ms))
        else:
            self._held.accept(plan, outcomes, now_ms)

    async def renew(self, now_ms: int) -> None:
        """Begin new numberings, and call nothing FRESH that was sent before: for a store put back from a copy, or after the
        clock was wrong by days."""
        await self._writer.write(lambda db: after_loss(db, now_ms))

    async def is_served(self, recipient: str) -> bool:
        """Whether a client may come again with a message that this recipient has had: it has not proved that it read our 250, or
        was told to come again for the sake of others."""
        self._held.release_all()
        return await self._writer.write(lambda db: outbox.is_served(db, recipient))

    def forget_send(self, plan: SendPlan) -> None:
        """The client has proved that it read our reply: the same bytes again are a new message. Not waited for, but before
        every `begin_send` that is called later."""
        if not self._held.forget(plan):
            self._writer.later(lambda db: outbox.forget_send(db, plan))

    def remember_outer_id(self, inner_id: str, outer_id: str, now_ms: int, participants: Iterable[str] | None = None) -> None:
        """A sealed message was sent or opened here: its Message-ID as others see it, and, of one that was opened and proven, whom
        it was from and for. Not waited for."""
        mark, key = self._outer_mark(inner_id), self._key("outer")
        marks = None
        if participants is not None:
            marks = b"".join(sorted(participant_mark(key, inner_id, address) for address in participants))
        self._writer.later(lambda db: accounts.remember_message(db, mark, outer_id, marks, now_ms))

    async def known_messages(self, inner_ids: Iterable[str]) -> dict[str, KnownMessage]:
        """Those of these Message-IDs that sealed messages had that were sent or opened here."""
        marks = {inner_id: self._outer_mark(inner_id) for inner_id in inner_ids}
        if not marks:
            return {}
        found = await self._writer.read(lambda db: accounts.known_messages(db, marks))
        return {inner_id: KnownMessage(outer_id, inner_id, split_marks(participants), self._key("outer"))
                for inner_id, (outer_id, participants) in found.items()}

    # ---- incoming --------------------------------------------------------------------------------------------------------

    async def judge(self, claim: Claim, arrival: Arrival, limits: FreshnessLimits, *, lease: str = "") -> Stored:
        """The verdict, written down with `delivered = no` when this returns. Deliver, then `mark_delivered`.

        `lease`: what this process must have to itself for that, where it shares the store. Raises `LeaseLost`."""
        key = self._key("seen")

        def judge(db: Db) -> Stored:
            if lease and self._owner and not members.holds(db, lease, self._owner):
                raise LeaseLost("another process watches this mailbox now")
            return seen.judge(db, key, claim, arrival, limits)
        return await self._writer.write(judge)

    async def record_foreign(self, claim: Claim, arrival: Arrival, limits: FreshnessLimits) -> Stored:
        """A message that another device opened: remembered as delivered."""
        key = self._key("seen")
        return await self._writer.write(lambda db: seen.judge(db, key, claim, arrival, limits, foreign=True))

    async def remembered(self, recipient: str, payload_digest: bytes) -> SeenRow | None:
        """What was judged of exactly these sealed bytes; reads only, for the offline commands."""
        return await self._writer.read(lambda db: seen.remembered(db, recipient, payload_digest))

    async def mark_delivered(self, row_id: int) -> None:
        await self._writer.write(lambda db: seen.mark_delivered(db, row_id))

    async def distrust(self, before_ms: int, *, recipient: str = "", sender: str = "") -> None:
        """Nothing sent at or before that time is FRESH any more; "" stands for every recipient, every sender."""
        await self._writer.write(lambda db: seen.add_distrust(db, before_ms, recipient, sender))

    async def folder_state(self, account: str, folder: str) -> FolderState | None:
        return await self._writer.read(lambda db: accounts.folder_state(db, account, folder))

    async def set_folder_state(self, account: str, folder: str, state: FolderState) -> None:
        await self._writer.write(lambda db: accounts.set_folder_state(db, account, folder, state))

    async def attempts(self, account: str, folder: str) -> list[Attempt]:
        return await self._writer.read(lambda db: accounts.attempts(db, account, folder))

    async def put_attempt(self, attempt: Attempt, now_ms: int) -> None:
        await self._writer.write(lambda db: accounts.put_attempt(db, attempt, now_ms))

    async def clear_attempt(self, account: str, folder: str, uidvalidity: int, uid: int) -> None:
        await self._writer.write(lambda db: accounts.clear_attempt(db, account, folder, uidvalidity, uid))

    # ---- processes that share the store ----------------------------------------------------------------------------------

    @property
    def networked(self) -> bool:
        """Whether other nodes may have it too."""
        return self._reader is None

    async def join(self, owner: bytes, *, before: bytes = b"", accounts: int = 0) -> None:
        """From now on `owner` names this process among those that share the store. Renew it within `members.MEMBER_MS`.

        `before`: one that is known to be dead, and in whose place this one was started."""
        def join(db: Db) -> None:
            if before:
                members.leave(db, before)
            members.forget_gone(db)
            members.renew(db, owner, accounts)
        asked = self.tenure.clock()
        await self._writer.write(join)
        self._owner = owner
        self.tenure.renew(asked)

    def new_owner(self) -> bytes:
        """For `join`."""
        return self._node_mark + os.urandom(8)

    async def bury_node(self) -> None:
        """Whatever process of this node was a member is dead: its lock is ours."""
        await self._writer.write(lambda db: members.bury(db, self._node_mark))

    @property
    def _node_mark(self) -> bytes:
        return hmac_sha256(self._key("host"), self._node)[:members.NODE_BYTES]

    async def renew_membership(self, accounts: int) -> bool:
        """`accounts`: how many mailboxes this process could watch. False: the membership had run out, by the clock of the
        database; `tenure` is a new one, and nothing that began under the old one may go on."""
        asked = self.tenure.clock()
        kept = await self._writer.write(lambda db: members.keep(db, self._owner, accounts))
        if not kept:
            self.tenure.lapse()
            self.tenure = members.Tenure()
        self.tenure.renew(asked)
        return kept

    async def leave(self) -> None:
        """At the end: what is still held is free."""
        await self._writer.write(lambda db: members.leave(db, self._owner))

    async def members(self) -> dict[bytes, int]:
        """Owner to number of accounts that it could watch."""
        return await self._writer.read(members.members)

    async def leases(self) -> dict[str, bytes]:
        """Name to owner, of those that are held."""
        return await self._writer.read(members.leases)

    async def take_lease(self, name: str) -> bool:
        """False: another process has it."""
        return await self._writer.write(lambda db: members.take(db, name, self._owner))

    async def give_lease_back(self, name: str) -> None:
        await self._writer.write(lambda db: members.give_back(db, name, self._owner))

    # ---- log and upkeep --------------------------------------------------------------------------------------------------

    def log_outcome(self, entry: OutcomeEntry) -> None:
        """One line for `malote log`. Not waited for."""
        self._held.log(entry)
        if self.on_outcome is not None:
            self.on_outcome(entry)

    async def recent_outcomes(self, limit: int = 100) -> list[OutcomeEntry]:
        """Newest first."""
        self._held.release_all()
        return await self._writer.read(lambda db: accounts.recent_outcomes(db, limit))

    async def expire_journal(self, now_ms: int, retry_memory_hours: int = 24) -> int:
        """Drop journal rows that no retry touched for that long; returns how many."""
        before_ms = now_ms - retry_memory_hours * 3_600_000
        return await self._in_pieces(lambda db: outbox.expire_journal(db, before_ms))

    async def expire(self, now_ms: int, remember_days: int = 400, *, late_days: int = 7, log_days: int = 400) -> None:
        """Drop what is too old. Seen rows are kept twice the lateness window at least: a later repeat is LATE by its time."""
        before_ms = now_ms - max(remember_days, 2 * late_days) * DAY_MS
        await self._in_pieces(lambda db: seen.expire_seen(db, before_ms))
        await self._writer.write(lambda db: accounts.expire_rest(db, now_ms - log_days * DAY_MS))

    # ---- inside ----------------------------------------------------------------------------------------------------------

    async def _look_up(self, addresses: Iterable[str]) -> dict[str, tuple[CardRecord | None, bool]]:
        wanted = tuple(addresses)
        if time.monotonic() - self._checked_at > CARD_CHECK_SECONDS:
            await self.change_mark()
        found = {address: known for address in wanted if (known := self._cache.get(address)) is not None}
        missing = [address for address in wanted if address not in found]
        if not missing:
            return found

        def read(db: Db) -> tuple[bytes, list[tuple[str, CardRecord | None, bool]]]:
            return cards.change_mark(db), [(at, cards.find_card(db, at), cards.had_card(db, at)) for at in missing]
        mark, entries = await self._writer.read(read)
        self._cache.fill(mark, entries)
        return found | {address: (record, had) for address, record, had in entries}

    async def _in_pieces(self, operation: Callable[[Db], int]) -> int:
        """Until it changes nothing more; others write in between. Returns the sum."""
        total = 0
        while changed := await self._writer.write(operation):
            total += changed
        return total

    async def _change(self, operation: Callable[[Db], T]) -> T:
        result = await self._writer.write(operation)
        self._checked_at = 0.0      # the next look-up asks for the change mark
        return result

    def _key(self, name: str) -> bytes:
        try:
            return self._keys[name]
        except KeyError:
            raise StoreUnavailable("the store was opened for reading only") from None

    def _outer_mark(self, inner_id: str) -> bytes:
        return hmac_sha256(self._key("outer"), inner_id.encode("utf-8", "surrogateescape"))


def _rank(level: Level) -> int:
    return list(Level).index(level)
