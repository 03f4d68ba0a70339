"""Finding the card of a recipient: its own, else that of its domain's gateway."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from malote.core.address import domain_of
from malote.core.card import Card, parse_card
from malote.errors import KeyMissing
from malote.store.records import CardRecord, Level
from malote.store.store import Store

MAX_PARSED = 5000       # cards kept parsed, about 20 KB each with their key objects; parsing one costs 250 us


@dataclass(frozen=True, slots=True)
class Found:
    card: Card | None       # usable now
    had_card: bool          # one is or ever was held for the address or its domain's gateway


class CardFinder:
    """Looks in the store. A card that merely came with a message (SEEN) is not used: nobody has vouched for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parsed: OrderedDict[bytes, Card] = OrderedDict()

    async def find(self, address: str, now_ms: int) -> Found:
        """For a canonical address. A person's card always comes before the gateway's, even when it has expired: falling back to
        the gateway then would let others read what was for the person alone. Raises `StoreUnavailable`."""
        gateway = f"@{domain_of(address)}"
        names = (address, gateway)
        records = await self._store.cards(names)
        had = await self._store.had_card(names)
        for name in names:
            record = records.get(name)
            if record is not None and record.level is not Level.SEEN:
                card = self._parse(record)
                return Found(card if _usable(card, now_ms) else None, True)
            if name in had and record is None:
                return Found(None, True)
        return Found(None, bool(had))

    def _parse(self, record: CardRecord) -> Card:
        card = self._parsed.get(record.card_hash)
        if card is None:
            card = self._parsed[record.card_hash] = parse_card(record.card_raw)
            if len(self._parsed) > MAX_PARSED:
                self._parsed.popitem(last=False)
        else:
            self._parsed.move_to_end(record.card_hash)
        return card


def _usable(card: Card, now_ms: int) -> bool:
    try:
        card.encryption_key(now_ms)
    except KeyMissing:
        return False
    return True
